"""What a run is about to do, in lines for people, before its first step."""

import platform
import socket

import torch
import triton

import fastmae
from fastmae.cores import usable_cores
from fastmae.data.loader import Loader
from fastmae.devices import device_name
from fastmae.model.config import ModelConfig
from fastmae.train.config.recipes import Recipe
from fastmae.train.config.run import Run
from fastmae.train.distributed.world import World


def overview(recipe: Recipe, run: Run, world: World, data: Loader, *, parameters: int, precision: str, attention: str,
             accumulate: int, total_steps: int, warmup_steps: float, done: int) -> list[str]:  # fmt: skip
    """The lines; every number that decides on the result stands in them as arithmetic."""
    config: ModelConfig = recipe.model
    if data.source.samples is None:
        length = f"a {data.source.kind} without an index: no exact order or resume; `fastmae shards index` makes one"
    else:
        length = f"{total_steps * recipe.effective_batch / data.source.samples:.2f} epochs of {data.source.samples} samples"
    shared = f", {run.parallel}, gradients shared in {run.reduce}" if world.size > 1 else ""
    return [
        f"model: {parameters / 1e6:.1f} M parameters, images {config.img_size[0]} x {config.img_size[1]}, {config.patches} "
        f"patches of {config.patch_size}, mask ratio {recipe.mask_ratio}, "
        f"target {'normalised' if config.norm_pix_loss else 'plain'} pixels",
        f"on {world.size} x {world.device.type}{shared}, {precision}, attention {attention}",
        f"effective batch = {run.batch_size} per process x {world.size} processes x {accumulate} accumulated "
        f"= {recipe.effective_batch}",
        f"lr = blr {recipe.blr:g} x {recipe.effective_batch} / 256 = {recipe.lr:g}, warm-up {warmup_steps:.0f} steps, "
        f"half cosine to {recipe.min_lr:g}",
        f"steps = {total_steps}, {length}; {done} done",
        f"data: {data.describe()}",
    ]


def environment(world: World) -> dict[str, object]:
    """Versions and hardware, as plain JSON."""
    return {
        "fastmae": fastmae.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "host": socket.gethostname(),
        "device": device_name(world.device),
        "processes": world.size,
        "processes_per_machine": world.local_size,
        "cores": usable_cores(),
    }
