"""Fill a run's tensors from a checkpoint, whatever number of processes wrote it, and however they shared the model."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from fastmae.errors import DataError
from fastmae.model.mae import MAE
from fastmae.model.weights import load_strictly, read_weights
from fastmae.train.checkpoint.format import MODEL, OLD_OPTIMIZER, TENSORS, read_state
from fastmae.train.checkpoint.state import random_state, set_random_state
from fastmae.train.checkpoint.tensors import describe_tensors, read_tensors
from fastmae.train.distributed.world import World

_NEEDED = ("model/", "optimizer/")  # what else a run has may be new in it


def restore(folder: Path, tensors: dict[str, Tensor], model: MAE, world: World) -> dict:
    """Fill ``tensors``, of ``run_tensors``, in place from the checkpoint ``folder``; return its state.

    Raises DataError, on every process, if it cannot be read or is of another architecture.
    """
    reason = None
    try:
        state = read_state(folder)
        if state["schema"] >= 3:
            _fill(folder / TENSORS, tensors, world)
        else:
            _fill_from_old(folder, tensors, model)
    except DataError as error:
        reason = error
    if world.any(reason is not None)[0]:
        raise reason or DataError(f"{folder}: another process of this run could not read it; it says why")
    return state


def _fill(folder: Path, tensors: dict[str, Tensor], world: World) -> None:
    found = describe_tensors(folder)
    own = random_state(world)
    was_there = own.keys() <= found.keys()  # a rank that was not goes on with its own
    wanted = {n: t for n, t in tensors.items() if n in found or n.startswith(_NEEDED)}
    read_tensors(folder, wanted | own if was_there else wanted)
    if was_there:
        set_random_state(own, world)


def _fill_from_old(folder: Path, tensors: dict[str, Tensor], model: MAE) -> None:
    """Of schemas 1 and 2: weights and moments as safetensors."""
    weights = read_weights(folder / MODEL)
    load_strictly(MAE(model.config), weights)  # says what does not fit
    try:
        moments = load_file(folder / OLD_OPTIMIZER)
    except (SafetensorError, OSError) as error:
        raise DataError(f"{folder / OLD_OPTIMIZER}: cannot be read, {error}") from error
    found = {f"model/{n}": t for n, t in weights.tensors.items()} | {f"optimizer/{n}": t for n, t in moments.items()}
    for name, tensor in tensors.items():
        if not name.startswith(_NEEDED):
            continue
        if name not in found and not moments and name.startswith("optimizer/"):
            continue  # saved before the first step: zeros, as they are
        if name not in found or found[name].shape != tensor.shape:
            raise DataError(f"{folder}: {name} is missing, or of another shape")
        _put(tensor, found[name])


@torch.no_grad()
def _put(target: Tensor, source: Tensor) -> None:
    if isinstance(target, DTensor):
        source = distribute_tensor(source.to(target.device), target.device_mesh, target.placements)
    target.copy_(source)
