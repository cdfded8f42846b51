"""Which checkpoint a run continues from, and whether it may."""

import json
from dataclasses import asdict
from pathlib import Path

from fastmae.config import ModelConfig
from fastmae.errors import InputError
from fastmae.train.checkpoint import find_checkpoint, read_state, verify
from fastmae.train.parallel import World
from fastmae.train.recipes import Recipe
from fastmae.train.run import Run

_FIXED = ("seed", "effective_batch")  # settings that decide which samples come next


def choose_checkpoint(run: Run, world: World) -> tuple[Path | None, list[str]]:
    """The checkpoint to continue from, or None, and a line for each damaged one passed over.

    The main process looks and verifies; the others take its word, so that all start at the same step. Raises InputError
    if a named checkpoint is older than the newest of the run's folder, DataError if it is damaged.
    """
    found, damaged, wrong = None, [], None
    if world.is_main:
        try:
            found, damaged = _choose(run)
        except InputError as error:
            wrong = error
    failed = world.from_main(str(wrong) if wrong else None)
    if failed is not None:  # raised by every process, so that none waits for one that is gone
        raise wrong or InputError(failed)
    word = world.from_main(str(found) if found else None)
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
    for name in _FIXED:
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
        return newest, damaged
    found = Path(run.resume)
    verify(found)
    if newest is not None and read_state(newest)["step"] > read_state(found)["step"]:
        raise InputError(
            f"{found}: {newest} is newer, and the next start would continue from that one; move it away, or give another --out"
        )
    return found, []
