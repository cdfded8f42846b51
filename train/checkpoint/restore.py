"""Fill a run's tensors from a checkpoint, whatever number of processes wrote it, and however they shared the model."""

from pathlib import Path

from torch import Tensor

from fastmae.errors import DataError
from fastmae.train.checkpoint.format import TENSORS, Checkpoint
from fastmae.train.checkpoint.state import random_state, set_random_state
from fastmae.train.checkpoint.tensors import describe_tensors, read_tensors
from fastmae.train.distributed.world import World

_NEEDED = ("model/", "optimizer/")  # what else a run has may be new in it


def restore(checkpoint: Checkpoint, tensors: dict[str, Tensor], world: World) -> None:
    """Fill ``tensors``, of ``run_tensors``, in place from ``checkpoint``.

    Raises DataError, on every rank, if one cannot read them or they are of another architecture.
    """
    reason = None
    try:
        _fill(checkpoint.folder / TENSORS, tensors, world)
    except DataError as error:
        reason = error
    if world.any(reason is not None)[0]:
        raise reason or DataError(f"{checkpoint.folder}: another rank could not read it; the error is in that rank's output")


def _fill(folder: Path, tensors: dict[str, Tensor], world: World) -> None:
    found = describe_tensors(folder)
    own = random_state(world)
    was_there = own.keys() <= found.keys()  # a rank that was not goes on with its own
    wanted = {n: t for n, t in tensors.items() if n in found or n.startswith(_NEEDED)}
    read_tensors(folder, wanted | own if was_there else wanted)
    if was_there:
        set_random_state(own, world)
