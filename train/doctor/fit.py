"""Whether a run's model and batch fit the memory of every process, and the largest batch that does."""

from dataclasses import replace

import torch

from fastmae.errors import InputError
from fastmae.host_memory import available_memory
from fastmae.model.config import ModelConfig
from fastmae.train.config.agreement import agree
from fastmae.train.config.precision import AUTOCAST, precision_of
from fastmae.train.config.recipes import Recipe
from fastmae.train.config.run import Run
from fastmae.train.distributed.world import World
from fastmae.train.doctor.estimate import estimate_step
from fastmae.train.doctor.findings import Report
from fastmae.train.doctor.largest_batch import try_batches


def check_fit(report: Report, world: World, run: Run, recipe: Recipe, device: torch.device) -> None:
    """On a GPU steps are tried, on the CPU their memory is estimated; every process does it at the same time."""
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


def _advised(largest: int, effective_batch: int, processes: int) -> int:
    """The largest batch up to ``largest`` of which a whole number makes up the effective batch."""
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
    return largest, f" (tried uncompiled, {peak / 2**30:.1f} GiB on rank {rank}; NCCL and DDP take about 1 GiB besides)"
