"""Whether a run's model and batch fit the memory of every process, and the largest batch that does.

On a GPU steps are tried. On the CPU their memory is estimated without running them:

    weights 4 P + gradients 4 P + moments 8 P + what the forward pass keeps for the backward pass + two of its largest tensors

P trained parameters. What is kept is counted on fake tensors (torch's ``FakeTensorMode``), which have shapes and no memory,
at two batch sizes; it grows in a straight line. Memory of libraries, loaders and fragmentation is not in it.
"""

import functools
from dataclasses import dataclass, replace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastmae.errors import InputError
from fastmae.host_memory import available_memory
from fastmae.model.config import ModelConfig, kept_patches
from fastmae.model.mae import MAE
from fastmae.model.masking import Masking
from fastmae.train.config.agreement import agree
from fastmae.train.config.precision import AUTOCAST, precision_of
from fastmae.train.config.recipes import Recipe
from fastmae.train.config.run import Run
from fastmae.train.distributed.world import World
from fastmae.train.doctor.findings import Report
from fastmae.train.doctor.largest_batch import try_batches

_BATCHES = (2, 4)


def check_fit(report: Report, world: World, run: Run, recipe: Recipe, device: torch.device) -> None:
    """Report the largest batch of the run's model; all processes look for it at the same time."""
    try:
        agree(recipe, run, world.size)
    except InputError as error:
        report.error(str(error))
    largest, how = _largest(world, run, recipe, recipe.model, device)
    asked = f"batch {run.batch_size} per process in {precision_of(run.precision, device.type)}"
    if largest >= run.batch_size:
        report.line(f"{asked}: fits; the largest that does is {largest}{how}")
        return
    batch = _advised(largest, recipe.effective_batch, world.size)
    advice = [f"--batch-size {batch} --effective-batch {recipe.effective_batch}"] if batch else []
    if not recipe.model.checkpointing:
        other, _ = _largest(world, run, recipe, replace(recipe.model, checkpointing=True), device)
        advice += [f"--checkpointing (the largest is {other} with it)"] if other > largest else []
    if run.parallel != "ddp" and world.size > 1:
        report.warning(f"{asked}: may not fit; the largest that does unsharded is {largest}{how}; if it fails, give "
                       f"{' or '.join([*advice, 'more processes'])}")  # fmt: skip
        return
    if not advice:
        advice = ["fewer processes on a machine" if device.type == "cpu" else "--parallel fsdp"]
    report.error(f"{asked}: does not fit; the largest that does is {largest}{how}; give {' or '.join(advice)}")


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Bytes of a step: ``fixed + batch * per_image``."""

    fixed: int
    per_image: int
    parameters: int
    """Trained ones."""

    def needed(self, batch: int) -> int:
        """Bytes at ``batch`` images."""
        return self.fixed + batch * self.per_image

    def largest(self, available: int) -> int:
        """The largest batch that fits ``available`` bytes; 0 if none does."""
        return max(0, (available - self.fixed) // self.per_image)


@functools.cache
def estimate_step(config: ModelConfig, mask_ratio: float, autocast: torch.dtype | None) -> Estimate:
    """The estimate for a model that trains under ``autocast``, or without it."""
    with FakeTensorMode():
        # Which backend is fastest cannot be measured on fake tensors; all but math keep the same.
        model = MAE(replace(config, attention="sdpa"))
        small, large = (_kept_bytes(model, mask_ratio, autocast, batch) for batch in _BATCHES)
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    per_image = (large - small) // (_BATCHES[1] - _BATCHES[0])
    return Estimate(fixed=16 * parameters + small - _BATCHES[0] * per_image, per_image=per_image, parameters=parameters)


def _advised(largest: int, effective_batch: int, processes: int) -> int:
    """The largest batch up to ``largest`` that divides the effective batch."""
    return next((b for b in range(largest, 0, -1) if effective_batch % (b * processes) == 0), largest)


def _largest(world: World, run: Run, recipe: Recipe, model: ModelConfig, device: torch.device) -> tuple[int, str]:
    """The largest batch of ``model`` that fits every process, and how it was found."""
    autocast = AUTOCAST[precision_of(run.precision, device.type)]
    if device.type == "cpu":
        estimate = estimate_step(model, recipe.mask_ratio, autocast)
        available = (available_memory() or 0) // world.local_size
        largest, available = min(world.gather([(estimate.largest(available), available)]))
        needed = estimate.needed(run.batch_size)
        return largest, f" (an estimate: {needed / 1e9:.2f} GB of the {available / 1e9:.2f} GB that are available to a process)"
    found = try_batches(model, recipe.mask_ratio, autocast, device, run.batch_size)
    largest, rank, peak = min(world.gather([(found.largest, world.rank, found.peak)]))
    return largest, f" (tried uncompiled, {peak / 2**30:.1f} GiB on rank {rank}; NCCL and DDP need about 1 GiB more)"


def _kept_bytes(model: MAE, mask_ratio: float, autocast: torch.dtype | None, batch: int) -> int:
    """Bytes kept for the backward pass of ``batch`` images, weights not among them, and twice the largest tensor."""
    config = model.config
    L = config.patches
    K = kept_patches(L, mask_ratio)
    images = torch.zeros(batch, config.in_chans, *config.img_size, dtype=torch.uint8)
    ids = torch.zeros(batch, L, dtype=torch.int32)
    masking = Masking(ids[:, :K].contiguous(), ids[:, K:].contiguous(), ids)
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage  # held, so that no other tensor gets its address
        return x

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x),
        torch.autocast("cpu", dtype=autocast, enabled=autocast is not None),
    ):
        model.training_loss(images, masking)
    sizes = [storage.nbytes() for storage in kept.values()]
    return sum(sizes) + 2 * max(sizes)
