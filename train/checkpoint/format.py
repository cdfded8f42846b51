"""Checkpoints: folders that are either complete or ignored.

``step-NNNNNNN/`` holds ``tensors/`` (all that a run resumes from, written by all ranks through DCP), ``model.safetensors``
(weights and config, for exchange), ``state.json`` (step, settings and position in the data, for people too) and
``manifest.json`` (size and xxh3-64 of all others), which is written last. ``saver.py`` writes them to a temporary folder,
flushes that to the disk, and renames it. Reading one runs no code from it.
"""

import contextlib
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path, PurePath

from fastmae.errors import DataError, SchemaError
from fastmae.files import digest, write_atomically
from fastmae.train.checkpoint.metadata import METADATA

SCHEMA = 3
MODEL, TENSORS, STATE, MANIFEST = "model.safetensors", "tensors", "state.json", "manifest.json"
_NAME = re.compile(r"step-(\d{7,})")
_KINDS = {
    "schema": int,
    "step": int,
    "data": dict,
    "model": str,
    "recipe": dict,
    "attention": dict,
}  # of every state
FIXED = ("seed", "effective_batch")  # fields of its recipe that decide which samples come next


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint, verified, and its ``state.json``."""

    folder: Path
    state: dict

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.state["step"]


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


def find_checkpoint(run: Path, newest: int | None = None) -> tuple[Checkpoint | None, list[str]]:
    """The newest complete checkpoint of ``run``, of step ``newest`` at most, and a line for each newer one that is damaged.

    Raises SchemaError if one of another version is newer than it.
    """
    damaged = []
    for folder in list_checkpoints(run):
        if newest is not None and step_of(folder) > newest:
            continue
        try:
            return open_checkpoint(folder), damaged
        except SchemaError:
            raise
        except DataError as error:
            damaged.append(str(error))
    return None, damaged


def open_checkpoint(folder: Path) -> Checkpoint:
    """The checkpoint ``folder``, every file of it verified against its manifest, and its state.

    Raises DataError naming the file that is missing or damaged, SchemaError if another version of fastmae wrote it.
    """
    files = _read_json(folder / MANIFEST).get("files")
    files = files if isinstance(files, dict) else {}
    for name in (*files, *({STATE} - files.keys())):
        _verify_file(folder, name, files.get(name))
    state = _read_state(folder / STATE)  # before the other names: another schema has other files
    tensors = {str(p.relative_to(folder)) for p in (folder / TENSORS).glob("*.distcp")} | {f"{TENSORS}/{METADATA}"}
    for name in sorted((tensors | {MODEL}) - files.keys()):
        _verify_file(folder, name, None)
    return Checkpoint(folder, state)


def write_manifest(folder: Path) -> int:
    """Write size and hash of every file in ``folder`` into its manifest; return their bytes."""
    files = {str(p.relative_to(folder)): _fingerprint(p) for p in sorted(folder.rglob("*")) if p.is_file()}
    write_json(folder / MANIFEST, {"files": files})
    return sum(file["bytes"] for file in files.values())


def remove_old(run: Path, step: int, keep: int, keep_every: int | None) -> None:
    """Keep the newest ``keep`` checkpoints up to ``step`` and those of every ``keep_every`` steps; remove the others.

    Counted from ``step`` downwards: damaged newer ones, which a resume skipped, must not push good ones out.
    """
    for old in [c for c in list_checkpoints(run) if step_of(c) <= step][keep:]:
        if keep_every is None or step_of(old) % keep_every:
            gone = run / f".{old.name}.removed"  # renamed first: killed in between, it is no damaged checkpoint
            _remove(gone)
            with contextlib.suppress(OSError):  # NFS keeps what somebody reads: tried again after the next save
                old.rename(gone)
            _remove(gone)


def remove_leftovers(run: Path) -> None:
    """Remove the unfinished checkpoints of a killed process."""
    for folder in [*run.glob(".step-*.partial"), *run.glob(".step-*.removed")]:
        _remove(folder)


def write_json(path: Path, document: dict) -> None:
    """Write ``document`` for people to read too."""
    with write_atomically(path) as file:
        file.write(json.dumps(document, indent=1).encode())


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)  # what remains takes disk space, and no save fails for it


def _read_state(path: Path) -> dict:
    state = _read_json(path)
    schema = state.get("schema")
    if type(schema) is int and schema != SCHEMA:
        raise SchemaError(f"{path}: has schema {schema}, this fastmae reads schema {SCHEMA}; use the version that wrote it")
    wrong = [name for name, kind in _KINDS.items() if type(state.get(name)) is not kind]
    wrong = wrong or [f"recipe.{name}" for name in FIXED if type(state["recipe"].get(name)) is not int]
    if wrong:
        raise DataError(f"{path}: {', '.join(wrong)} missing or of the wrong type; it is not the state of a checkpoint")
    return state


def _verify_file(folder: Path, name: str, stated: object) -> None:
    path = folder / name
    if ".." in PurePath(name).parts or PurePath(name).is_absolute():
        raise DataError(f"{folder / MANIFEST}: names {name}, outside its folder")
    try:
        found = _fingerprint(path) if stated is not None and path.is_file() else None
    except (OSError, ValueError) as error:  # a failing disk; an impossible file name
        raise DataError(f"{path}: cannot be read, {error}") from error
    if found is None:
        raise DataError(f"{path}: missing; the checkpoint is not complete")
    if found != stated:
        listed = stated if isinstance(stated, dict) else {}
        raise DataError(
            f"{path}: damaged, {found['bytes']} bytes with hash {found['xxh3']}; its manifest lists {listed.get('bytes')} with "
            f"{listed.get('xxh3')}"
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
