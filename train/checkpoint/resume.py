"""Which checkpoint a run continues from, and whether it may."""

import json
from dataclasses import asdict
from pathlib import Path

from fastmae.errors import DataError, InputError
from fastmae.model.config import ModelConfig
from fastmae.train.checkpoint.format import FIXED, find_checkpoint, list_checkpoints, read_state, step_of, verify
from fastmae.train.config.recipes import Recipe
from fastmae.train.config.run import Run
from fastmae.train.distributed.world import World


def choose_checkpoint(run: Run, world: World) -> tuple[Path | None, list[str]]:
    """The checkpoint to continue from, or None, and a line for each damaged one passed over.

    The main process looks and verifies; the others take its word, so that all start at the same step. Raises InputError
    if a named checkpoint is older than the newest of the run's folder, DataError if ``exact`` it is damaged, or if every
    checkpoint of a run is: a run that has lost all of them does not begin anew by itself.
    """
    damaged: list[str] = []

    def choose() -> str | None:
        found, lines = _choose(run)
        damaged.extend(lines)
        return str(found) if found else None

    word = world.by_main(choose)
    return Path(word) if word else None, [f"ignored a damaged checkpoint: {line}" for line in damaged]


def check_resume(folder: Path, recipe: Recipe) -> list[str]:
    """A line for each setting that differs from the checkpoint's. Raises InputError on one that must not."""
    state = read_state(folder)
    theirs, ours = ModelConfig.from_json(state["model"]), recipe.model
    changed = [f for f in asdict(ours) if getattr(ours, f) != getattr(theirs, f)]
    if wrong := [f for f in changed if f in ours.architecture]:
        differences = ", ".join(f"{f} {getattr(theirs, f)} there and {getattr(ours, f)} here" for f in wrong)
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


def plain_settings(recipe: Recipe) -> dict:
    """The recipe without its model as plain JSON values."""
    settings = json.loads(json.dumps(asdict(recipe)))
    settings.pop("model")
    return settings


def _choose(run: Run) -> tuple[Path | None, list[str]]:
    newest, damaged = find_checkpoint(run.out)
    if run.resume == "auto":
        if newest is None and damaged:
            raise DataError(f"{run.out}: no checkpoint of this run is whole; give another --out to begin anew; {damaged[0]}")
        return newest, damaged
    found, lines = Path(run.resume.removeprefix("exact:")), []
    if run.resume.startswith("exact:"):
        verify(found)
        read_state(found)
    else:
        found, lines = _nearest(found)
    if newest is not None and read_state(newest)["step"] > read_state(found)["step"]:
        raise InputError(
            f"{found}: {newest} is newer, and the next start would continue from that one; move it away, or give another --out"
        )
    return found, lines


def _nearest(path: Path) -> tuple[Path, list[str]]:
    """The checkpoint ``path``, or the newest whole one of the run ``path``; if damaged, the next older one beside it."""
    if not path.is_dir():
        raise DataError(f"{path}: no such folder; give a checkpoint of a run, or a run")
    if list_checkpoints(path):
        found, damaged = find_checkpoint(path)
    elif (step := step_of(path)) is not None:
        found, damaged = find_checkpoint(path.parent, newest=step)
    else:  # of another name: it has no older ones
        verify(path)
        read_state(path)
        return path, []
    if found is None:
        raise DataError(f"{path}: no complete checkpoint{'; ' + damaged[0] if damaged else ' is there'}")
    return found, damaged
