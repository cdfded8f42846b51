"""``settings.json`` in a run's folder: the run's settings, which a command that resumes it need not repeat.

Written at each start, read by the command line alone, as flags before those that are given. What must not change between starts
is checked against the checkpoint itself, on resume. ``--allow-pipe`` is never taken from there: a run's folder may come from
elsewhere, and its ``data`` could be a shell command.
"""

import json
from dataclasses import fields, replace
from pathlib import Path

import tyro

from fastmae.errors import DataError
from fastmae.files import open_home, write_atomically
from fastmae.model.config import PRESETS
from fastmae.train.config.recipes import Recipe
from fastmae.train.config.run import Run
from fastmae.train.config.settings import MODEL, TRAINING, PretrainSettings

SETTINGS = "settings.json"
_OF_COMMAND = ("out", "resume", "allow_pipe")  # never the run's own


def write_settings(recipe: Recipe, run: Run) -> None:
    """Write the settings of a run into its folder. Raises InputError or OSError if it cannot be written there."""
    model = recipe.model
    sizes = {name: (found["embed_dim"], found["depth"], found["num_heads"]) for name, found in PRESETS.items()}
    own = (model.embed_dim, model.depth, model.num_heads)
    kept = {"preset": next((name for name, found in sizes.items() if found == own), None)}
    kept |= {f.name: getattr(run, f.name) for f in fields(Run) if f.name not in _OF_COMMAND}
    kept |= {name: getattr(model, name) for name in (*MODEL, "img_size")}
    kept |= {name: getattr(recipe, name) for name in TRAINING}
    kept |= {"crop_scale": recipe.augment.scale, "flip": recipe.augment.flip}
    kept |= {"progressive": [f"{share}:{height}x{width}" for share, (height, width) in recipe.progressive] or None}
    with write_atomically(run.out / SETTINGS) as file:
        file.write(json.dumps(kept, indent=1, default=str).encode())


def with_settings_of_run(given: PretrainSettings, arguments: list[str]) -> tuple[PretrainSettings, Path | None]:
    """``given``, which was parsed from ``arguments``, with the settings of the run that it resumes where none are given, and
    the file that holds these; None if no run is resumed, or it has no such file.

    Raises DataError if the file holds anything but settings; ends the program as the parser does on a wrong value.
    """
    if (path := _settings_file(given)) is None:
        return given, None
    try:
        kept = json.loads(path.read_text())
        if (preset := kept.pop("preset")) not in (None, *PRESETS):
            raise ValueError(f"no preset is named {preset!r}")
        if unknown := kept.keys() - {f.name for f in fields(given)}:  # the parser has flags of its own, which write files
            raise ValueError(f"no setting is named {', '.join(sorted(unknown))}")
        # Lists first: a flag of any number of values must not take in a preset that follows it.
        values = sorted(kept.items(), key=lambda item: not isinstance(item[1], list))
        flags = [part for name, value in values for part in _flag(name, value)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{path}: holds no settings of a run, {error!r}; remove it and give the settings again") from None
    found = tyro.cli(tyro.conf.OmitArgPrefixes[type(given)], prog=f"fastmae pretrain (with {path})", args=[*flags, *arguments])
    if given.preset is None and given.recipe is None:
        found = replace(found, preset=preset)
    if given.steps is None and (given.epochs is not None or given.recipe is not None):  # the run's own would contradict them
        is_same = given.recipe is None and given.epochs == kept.get("epochs")
        warmup = found.warmup_epochs if is_same else given.warmup_epochs
        found = replace(found, epochs=given.epochs, steps=None, warmup_epochs=warmup)
    return replace(found, **{name: getattr(given, name) for name in _OF_COMMAND}), path


def _settings_file(given: PretrainSettings) -> Path | None:
    """That of the run that is resumed. A folder without a checkpoint is a start from step 0, with the settings given."""
    if given.resume != "auto":
        path = open_home(Path(given.resume.removeprefix("exact:")))
        found = [path / SETTINGS, path.parent / SETTINGS]
    elif given.out is not None and any(open_home(given.out).glob("step-*")):
        found = [open_home(given.out) / SETTINGS]
    else:
        return None
    return next((path for path in found if path.is_file()), None)


def _flag(name: str, value: object) -> list[str]:
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    if value is None and name != "draw_every":  # None is the default of all others
        return []
    values = [str(v) for v in (value if isinstance(value, list) else [value])]
    if any(v.startswith("--") for v in values):
        raise ValueError(f"{name} must not begin with --, got {values}")
    return [f"--{flag}", *values]
