"""Checkpoints: folders that are either complete or ignored.

``step-NNNNNNN/`` holds ``tensors/`` (all that a run goes on from, written by all processes through DCP), ``model.safetensors``
(weights and config, for exchange), ``state.json`` (where the run stands, for people too) and ``manifest.json`` (size and
xxh3-64 of all others), which is written last. ``saver.py`` writes them aside, flushes them to the disk, and renames the
folder; the newest complete one is found by looking. Reading one runs nothing of it.
"""

import contextlib
import json
import re
import shutil
from pathlib import Path, PurePath

from fastmae.errors import DataError, InputError
from fastmae.files import digest, write_atomically
from fastmae.train.checkpoint.metadata import METADATA

SCHEMA = 3
MODEL, TENSORS, STATE, MANIFEST = "model.safetensors", "tensors", "state.json", "manifest.json"
OLD_OPTIMIZER = "optimizer.safetensors"  # of schemas 1 and 2, beside the weights instead of ``tensors/``
_NAME = re.compile(r"step-(\d{7,})")
_KINDS = {"schema": int, "step": int, "data": dict, "model": str, "recipe": dict}  # what every state.json says
FIXED = ("seed", "effective_batch")  # and its recipe: what decides which samples come next


def checkpoint_folder(run: Path, step: int) -> Path:
    """Where the checkpoint of ``step`` lies."""
    return run / f"step-{step:07d}"


def step_of(folder: Path) -> int | None:
    """The step in a checkpoint folder's name; None if it is no checkpoint's name."""
    match = _NAME.fullmatch(folder.name)
    return int(match[1]) if match else None


def list_checkpoints(run: Path) -> list[Path]:
    """Checkpoint folders of ``run``, newest first, complete or not."""
    found = [p for p in run.glob("step-*") if _NAME.fullmatch(p.name) and p.is_dir()]
    return sorted(found, key=step_of, reverse=True)


def find_checkpoint(run: Path, newest: int | None = None) -> tuple[Path | None, list[str]]:
    """The newest complete checkpoint of ``run``, of step ``newest`` at most, and a line for each newer one that is damaged."""
    damaged = []
    for folder in list_checkpoints(run):
        if newest is not None and step_of(folder) > newest:
            continue
        try:
            verify(folder)
            read_state(folder)
        except DataError as error:
            damaged.append(str(error))
        else:
            return folder, damaged
    return None, damaged


def write_manifest(folder: Path) -> int:
    """State every file in ``folder``, in a file that is written last; return their bytes."""
    files = {str(p.relative_to(folder)): _fingerprint(p) for p in sorted(folder.rglob("*")) if p.is_file()}
    write_json(folder / MANIFEST, {"files": files})
    return sum(file["bytes"] for file in files.values())


def verify(folder: Path) -> None:
    """Raise DataError naming the file unless every file of ``folder`` has the bytes that its manifest states."""
    files = _read_json(folder / MANIFEST).get("files")
    files = files if isinstance(files, dict) else {}
    tensors = {str(p.relative_to(folder)) for p in (folder / TENSORS).glob("*.distcp")} | {f"{TENSORS}/{METADATA}"}
    for name in (*files, *sorted({MODEL, STATE} - files.keys())):
        _verify_file(folder, name, files.get(name))
    for name in sorted(({OLD_OPTIMIZER} if OLD_OPTIMIZER in files else tensors) - files.keys()):
        _verify_file(folder, name, None)


def read_state(folder: Path) -> dict:
    """``state.json`` of a checkpoint, in today's form.

    Raises DataError if it is missing or damaged, InputError if it is of a newer schema: then it is good, and must neither be
    passed over nor replaced.
    """
    path = folder / STATE
    state = _read_json(path)
    if type(schema := state.get("schema")) is int and schema > SCHEMA:
        raise InputError(f"{path}: schema {schema} is newer than {SCHEMA}; update fastmae")
    wrong = [name for name, kind in _KINDS.items() if type(state.get(name)) is not kind and (schema, name) != (1, "data")]
    wrong = wrong or [name for name in FIXED if type(state["recipe"].get(name)) is not int]
    if wrong:
        raise DataError(f"{path}: says nothing of {', '.join(wrong)}, or not as it must; it is no checkpoint's")
    if schema == 1:  # the place in the data was a word that cannot be compared any more
        recipe = state["recipe"]
        samples = state["step"] * recipe["effective_batch"]
        state["data"] = {"samples": samples, "fingerprint": None, "seed": recipe["seed"], "views": 1, "shuffle_window": None}
    return state


def remove_old(run: Path, step: int, keep: int, keep_every: int | None) -> None:
    """Keep the newest ``keep`` checkpoints up to ``step`` and those of every ``keep_every`` steps; remove the others.

    Counted from ``step`` downwards: damaged newer ones, which a resume passed over, must not push good ones out.
    """
    for old in [c for c in list_checkpoints(run) if step_of(c) <= step][keep:]:
        if keep_every is None or step_of(old) % keep_every:
            gone = run / f".{old.name}.removed"  # renamed first: killed in between, it is no damaged checkpoint
            _remove(gone)
            with contextlib.suppress(OSError):  # NFS keeps what somebody reads: tried again after the next save
                old.rename(gone)
            _remove(gone)


def remove_leftovers(run: Path) -> None:
    """Remove what a process that was killed has left unfinished."""
    for left_over in [*run.glob(".step-*.partial"), *run.glob(".step-*.removed")]:
        _remove(left_over)


def write_json(path: Path, document: dict) -> None:
    """Write ``document`` for people to read too."""
    with write_atomically(path) as file:
        file.write(json.dumps(document, indent=1).encode())


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)  # what is left takes room, and no save fails for it


def _verify_file(folder: Path, name: str, stated: object) -> None:
    path = folder / name
    if ".." in PurePath(name).parts or PurePath(name).is_absolute():
        raise DataError(f"{folder / MANIFEST}: names {name}, outside its folder")
    try:
        found = _fingerprint(path) if stated is not None and path.is_file() else None
    except (OSError, ValueError) as error:  # a disk that gives it no more; a name that is none
        raise DataError(f"{path}: cannot be read, {error}") from error
    if found is None:
        raise DataError(f"{path}: missing; the checkpoint is not complete")
    if found != stated:
        said = stated if isinstance(stated, dict) else {}
        raise DataError(
            f"{path}: damaged, {found['bytes']} bytes with hash {found['xxh3']}; its manifest says {said.get('bytes')} with "
            f"{said.get('xxh3')}"
        )


def _read_json(path: Path) -> dict:
    try:
        document = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: missing or damaged, {error}") from error
    return document if isinstance(document, dict) else {}


def _fingerprint(path: Path) -> dict:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "xxh3": digest(file)}
