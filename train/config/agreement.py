"""Whether a recipe, a run and its number of processes go together."""

from fastmae.errors import InputError
from fastmae.train.config.recipes import Recipe
from fastmae.train.config.run import Run, accumulation


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
