"""Checkpoints: folders that are either complete or ignored.

``step-NNNNNNN/`` holds ``model.safetensors`` (weights and config, for exchange), ``optimizer.safetensors`` (AdamW's moments by
parameter name), ``state.json`` (where the run stands, for people too) and ``manifest.json`` (size and xxh3-64 of the others).
All of it is written under another name, flushed to the disk, and renamed; the newest complete one is found by looking.
Nothing in a checkpoint is ever unpickled. Masks, crops and order need no generator state: they follow from the position.
"""

import json
import re
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.optim import AdamW

from fastmae.convert import load_strictly, read_weights, save_model, save_tensors
from fastmae.errors import DataError
from fastmae.files import digest, sync_folder, write_atomically
from fastmae.mae import MAE
from fastmae.train.optimizer import parameter_names

SCHEMA = 2
MODEL, OPTIMIZER, STATE, MANIFEST = "model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"
_NAME = re.compile(r"step-(\d{7,})")


def save_checkpoint(run: Path, step: int, model: MAE, optimizer: AdamW, state: dict, keep: int) -> Path:
    """Write the checkpoint of ``step`` into ``run`` and remove all but the newest ``keep``; return its folder.

    ``state`` is plain JSON. An error leaves earlier checkpoints as they were.
    """
    folder = checkpoint_folder(run, step)
    partial = run / f".{folder.name}.partial"
    for left_over in run.glob(".step-*.partial"):  # of a save that was killed
        shutil.rmtree(left_over)
    partial.mkdir()
    try:
        save_model(model, partial / MODEL)
        save_tensors(_moments(model, optimizer), partial / OPTIMIZER)
        _write_json(partial / STATE, {"schema": SCHEMA, "step": step, **state})
        files = {name: _fingerprint(partial / name) for name in (MODEL, OPTIMIZER, STATE)}
        _write_json(partial / MANIFEST, {"files": files})
        shutil.rmtree(folder, ignore_errors=True)  # a damaged one of the same step
        partial.rename(folder)
        sync_folder(run)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    # Counted from this one downwards: damaged newer ones, which a resume passed over, must not push good ones out.
    for old in [c for c in list_checkpoints(run) if _step(c) <= step][keep:]:
        shutil.rmtree(old)
    return folder


def checkpoint_folder(run: Path, step: int) -> Path:
    """Where the checkpoint of ``step`` lies."""
    return run / f"step-{step:07d}"


def list_checkpoints(run: Path) -> list[Path]:
    """Checkpoint folders of ``run``, newest first, complete or not."""
    found = [p for p in run.glob("step-*") if _NAME.fullmatch(p.name) and p.is_dir()]
    return sorted(found, key=_step, reverse=True)


def find_checkpoint(run: Path) -> tuple[Path | None, list[str]]:
    """The newest complete checkpoint of ``run``, and a line for each newer one that is damaged."""
    damaged = []
    for folder in list_checkpoints(run):
        try:
            verify(folder)
        except DataError as error:
            damaged.append(str(error))
        else:
            return folder, damaged
    return None, damaged


def verify(folder: Path) -> None:
    """Raise DataError naming the file unless every file of ``folder`` has the bytes that its manifest states."""
    files = _read_json(folder / MANIFEST).get("files", {})
    for name in (MODEL, OPTIMIZER, STATE):
        path = folder / name
        if name not in files or not path.is_file():
            raise DataError(f"{path}: missing; the checkpoint is not complete")
        found = _fingerprint(path)
        if found != files[name]:
            raise DataError(
                f"{path}: damaged, {found['bytes']} bytes with hash {found['xxh3']}; its manifest says {files[name]}"
            )


def read_state(folder: Path) -> dict:
    """``state.json`` of a checkpoint. Raises DataError if it is missing or of a newer schema."""
    state = _read_json(folder / STATE)
    if state.get("schema", 0) > SCHEMA:
        raise DataError(f"{folder / STATE}: schema {state['schema']} is newer than {SCHEMA}; update fastmae")
    if state.get("schema") == 1:  # the place in the data was one word, of an index that is not read any more
        raise DataError(f"{folder / STATE}: schema 1, from before 0.1.0; convert its model.safetensors, and start a new run")
    return state


def load_checkpoint(folder: Path, model: MAE, optimizer: AdamW) -> dict:
    """Load a checkpoint into ``model`` and ``optimizer``; return its state. Raises DataError on another architecture."""
    state = read_state(folder)
    load_strictly(model, read_weights(folder / MODEL))
    try:
        moments = load_file(folder / OPTIMIZER)
    except (SafetensorError, OSError) as error:
        raise DataError(f"{folder / OPTIMIZER}: cannot be read, {error}") from error
    names = parameter_names(model)
    slots = {key.partition("/")[0] for key in moments}
    per_parameter = {i: {slot: moments[f"{slot}/{name}"] for slot in slots} for i, name in enumerate(names)} if slots else {}
    optimizer.load_state_dict({"state": per_parameter, "param_groups": optimizer.state_dict()["param_groups"]})
    return state


def _step(folder: Path) -> int:
    return int(_NAME.fullmatch(folder.name)[1])


def _moments(model: MAE, optimizer: AdamW) -> dict[str, torch.Tensor]:
    state = optimizer.state_dict()["state"]
    names = parameter_names(model)
    return {f"{slot}/{names[i]}": value.cpu() for i, slots in state.items() for slot, value in slots.items()}


def _write_json(path: Path, document: dict) -> None:
    with write_atomically(path) as file:
        file.write(json.dumps(document, indent=1).encode())


def _read_json(path: Path) -> dict:
    try:
        document = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: missing or damaged, {error}") from error
    return document if isinstance(document, dict) else {}


def _fingerprint(path: Path) -> dict:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "xxh3": digest(file)}
