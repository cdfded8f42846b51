"""Disk space for a run's checkpoints, checked before the first step and not at the first save."""

import os
import shutil

from torch import Tensor

from fastmae.errors import InputError
from fastmae.train.checkpoint.format import list_checkpoints, remove_leftovers
from fastmae.train.checkpoint.state import total_bytes
from fastmae.train.config.run import Run

_FILES = 8  # and folders of a checkpoint, besides one file per rank


def bytes_of_checkpoint(tensors: dict[str, Tensor]) -> int:
    """Bytes that a checkpoint of the ``tensors`` of a run takes: all of them, and the model's once more in
    ``model.safetensors``."""
    model = {name: tensor for name, tensor in tensors.items() if name.startswith("model/")}
    return total_bytes(tensors) + total_bytes(model) + (1 << 20)


def check_room(run: Run, needed: int, *, world_size: int, first_step: int, total_steps: int) -> str | None:
    """A warning if the run's folder cannot hold as many checkpoints of ``needed`` bytes as ``--keep`` and
    ``--keep-every`` ask for.

    Raises InputError with path, bytes needed and free if it cannot hold a single one. Removes unfinished checkpoints of an
    earlier process.
    """
    if first_step >= total_steps:
        return None
    remove_leftovers(run.out)
    free, system = shutil.disk_usage(run.out).free, os.statvfs(run.out)
    if free < needed:
        raise InputError(
            f"{run.out}: a checkpoint needs {needed:,} bytes, {free:,} are free; free disk space, or give another --out"
        )
    if system.f_files and system.f_favail < _FILES + world_size:  # a file system without a fixed number of them says 0
        raise InputError(
            f"{run.out}: a checkpoint needs {_FILES + world_size} files, {system.f_favail} inodes are free (df -i): "
            "remove files, or give another --out"
        )
    existing = len(list_checkpoints(run.out))
    saves = -(-total_steps // run.save_every) - first_step // run.save_every
    more = max(1, min(saves, run.keep + 1 - existing))  # an old one is removed once its successor is written
    if run.keep_every:
        more = min(saves, more + total_steps // run.keep_every - first_step // run.keep_every)
    if free >= more * needed:
        return None
    return (
        f"{run.out}: space for {free // needed} of {more} further checkpoints of {needed:,} bytes, {free:,} are free; saves "
        "fail once it is full: free disk space, or give a smaller --keep or larger --keep-every"
    )
