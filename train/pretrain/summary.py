"""What a run is about to do, before its first step: in lines for people, and as the start event of ``metrics.jsonl``."""

import platform
import socket
from dataclasses import asdict
from pathlib import Path

import torch
import triton

import fastmae
from fastmae.cores import usable_cores
from fastmae.devices import device_name
from fastmae.train.checkpoint.resume import plain_settings
from fastmae.train.distributed.world import World
from fastmae.train.pretrain.setup import Setup


def summary(setup: Setup) -> list[str]:
    """The lines; every number that decides on the result stands in them as arithmetic."""
    recipe, run, world, source = setup.recipe, setup.run, setup.world, setup.loader.source
    config, batch = recipe.model, recipe.effective_batch
    parameters = sum(p.numel() for p in setup.model.parameters() if p.requires_grad)
    if source.samples is None:
        length = f"a {source.kind} without an index: no exact order or resume; `fastmae shards index` makes one"
    else:
        length = f"{setup.total_steps * batch / source.samples:.2f} epochs of {source.samples} samples"
    reduced = f", {run.parallel}, gradients reduced in {run.reduce}" if world.size > 1 else ""
    return [
        f"model: {parameters / 1e6:.1f} M parameters, images {config.img_size[0]} x {config.img_size[1]}, {config.patches} "
        f"patches of {config.patch_size}, mask ratio {recipe.mask_ratio}, "
        f"target {'normalised' if config.norm_pix_loss else 'plain'} pixels",
        f"on {world.size} x {world.device.type}{reduced}, {setup.precision}, attention {setup.attention.text}",
        f"effective batch = {run.batch_size} per process x {world.size} processes x {setup.accumulate} accumulated = {batch}",
        f"lr = blr {recipe.blr:g} x {batch} / 256 = {recipe.lr:g}, warm-up {setup.warmup_steps:.0f} steps, "
        f"half cosine to {recipe.min_lr:g}",
        f"steps = {setup.total_steps}, {length}; {setup.first_step} done",
        f"data: {setup.loader.describe()}",
    ]


def start_event(setup: Setup) -> dict[str, object]:
    """Settings, versions and hardware, as plain JSON."""
    recipe, run = setup.recipe, setup.run
    return {
        "step": setup.first_step,
        "total_steps": setup.total_steps,
        "recipe": {**plain_settings(recipe), "model": asdict(recipe.model)},
        "run": {name: str(v) if isinstance(v, Path) else v for name, v in asdict(run).items()},
        "world": setup.world.size,
        "parallel": run.parallel,
        "attention": setup.attention.text,
        "environment": environment(setup.world),
        "resumed_from": setup.checkpoint and str(setup.checkpoint.folder),
    }


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
