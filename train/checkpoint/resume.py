"""Resume a run: choose its checkpoint, check its settings, load its tensors, whatever world size and sharding wrote them."""

import json
from dataclasses import asdict
from pathlib import Path

from torch import Tensor

from fastmae.errors import DataError, InputError
from fastmae.model.config import ModelConfig
from fastmae.train.checkpoint.format import (
    FIXED,
    TENSORS,
    Checkpoint,
    find_checkpoint,
    list_checkpoints,
    open_checkpoint,
    step_of,
)
from fastmae.train.checkpoint.state import random_state, set_random_state
from fastmae.train.checkpoint.tensors import describe_tensors, read_tensors
from fastmae.train.config.recipes import Recipe
from fastmae.train.config.run import Run
from fastmae.train.distributed.world import World

_NEEDED = ("model/", "optimizer/")  # any other tensor of a run may be missing in its checkpoint


def choose_checkpoint(run: Run, world: World) -> tuple[Checkpoint | None, list[str]]:
    """The checkpoint to resume from, or None, and a line for each damaged one that was skipped.

    Rank 0 verifies and reads it, the others receive what it has read, so that all start at the same step. Raises InputError if
    the named checkpoint is older than the newest in the run's folder, DataError if an ``exact:`` one is damaged, or if every
    checkpoint of a run is: a run that has lost all of them is not started from step 0 unasked.
    """
    damaged: list[str] = []

    def choose() -> str | None:
        found, lines = _choose(run)
        damaged.extend(f"skipped a damaged checkpoint: {line}" for line in lines)
        return json.dumps([str(found.folder), found.state]) if found else None

    chosen = world.by_main(choose)
    if chosen is None:
        return None, damaged
    folder, state = json.loads(chosen)
    return Checkpoint(Path(folder), state), damaged


def check_resume(checkpoint: Checkpoint, recipe: Recipe) -> list[str]:
    """A line for each setting that differs from the checkpoint's. Raises InputError on one that must not."""
    folder, state = checkpoint.folder, checkpoint.state
    theirs, ours = ModelConfig.from_json(state["model"]), recipe.model
    changed = [f for f in asdict(ours) if getattr(ours, f) != getattr(theirs, f)]
    if wrong := [f for f in changed if f in ours.architecture]:
        differences = ", ".join(f"{f} {getattr(theirs, f)} in the checkpoint and {getattr(ours, f)} in this run" for f in wrong)
        raise InputError(f"{folder}: a checkpoint of another architecture, {differences}; give its settings or another --out")
    before, now = state["recipe"], plain_settings(recipe)
    for name in FIXED:
        if before[name] != now[name]:
            raise InputError(
                f"{folder}: was trained with {name} {before[name]}, not {now[name]}; give that value or another --out"
            )
    lines = [(f, getattr(theirs, f), getattr(ours, f)) for f in changed]
    lines += [(name, before.get(name), value) for name, value in now.items() if before.get(name) != value]
    return [f"changed since the checkpoint: {name} {old} -> {new}" for name, old, new in lines]


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


def plain_settings(recipe: Recipe) -> dict:
    """The recipe without its model as plain JSON values."""
    settings = json.loads(json.dumps(asdict(recipe)))
    settings.pop("model")
    return settings


def _choose(run: Run) -> tuple[Checkpoint | None, list[str]]:
    newest, damaged = find_checkpoint(run.out)
    if run.resume == "auto":
        if newest is None and damaged:
            raise DataError(f"{run.out}: no complete checkpoint, give another --out to start from step 0; {damaged[0]}")
        return newest, damaged
    path, lines = Path(run.resume.removeprefix("exact:")), []
    if run.resume.startswith("exact:"):
        found = open_checkpoint(path)
    else:
        found, lines = _nearest(path)
    if newest is not None and newest.step > found.step:
        raise InputError(
            f"{found.folder}: {newest.folder} is newer, and the next start would resume from that one; move it away, or give "
            "another --out"
        )
    return found, lines


def _nearest(path: Path) -> tuple[Checkpoint, list[str]]:
    """The checkpoint ``path``, or the newest complete one of the run ``path``; if damaged, the next older one beside it."""
    if not path.is_dir():
        raise DataError(f"{path}: no such folder; give a checkpoint of a run, or a run")
    if list_checkpoints(path):
        found, damaged = find_checkpoint(path)
    elif (step := step_of(path)) is not None:
        found, damaged = find_checkpoint(path.parent, newest=step)
    else:  # of another name: it has no older ones
        return open_checkpoint(path), []
    if found is None:
        raise DataError(f"{path}: no complete checkpoint{'; ' + damaged[0] if damaged else ' is there'}")
    return found, damaged


def _fill(folder: Path, tensors: dict[str, Tensor], world: World) -> None:
    found = describe_tensors(folder)
    own = random_state(world)
    was_there = own.keys() <= found.keys()  # a new rank keeps its own
    wanted = {n: t for n, t in tensors.items() if n in found or n.startswith(_NEEDED)}
    read_tensors(folder, wanted | own if was_there else wanted)
    if was_there:
        set_random_state(own, world)
