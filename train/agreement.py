"""Whether a recipe, a run and its number of processes go together, and the dtype that they compute in."""

import torch

from fastmae.errors import InputError
from fastmae.train.recipes import Recipe
from fastmae.train.run import Run, accumulation

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}


def agree(recipe: Recipe, run: Run, processes: int) -> int:
    """Micro-batches per step. Raises InputError on settings that exclude each other."""
    accumulate = accumulation(recipe.effective_batch, run.batch_size, processes)
    if run.reduce == "bf16" and run.parallel != "ddp" and accumulate > 1:
        raise InputError(
            f"reduce bf16 of a sharded model would round each of {accumulate} accumulated micro-batches; remove it, "
            "or choose a --batch-size that needs no accumulation"
        )
    if run.cuda_graphs and recipe.progressive:
        raise InputError("cuda graphs keep one image size; remove --cuda-graphs or --progressive")
    return accumulate


def precision_of(run: Run, device: torch.device) -> tuple[str, torch.dtype | None]:
    """The precision's name, and autocast's dtype, None without autocast."""
    name = ("bf16" if device.type == "cuda" else "fp32") if run.precision == "auto" else run.precision
    return name, _DTYPES[name]
