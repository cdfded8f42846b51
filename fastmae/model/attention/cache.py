"""The disk cache of what was tried on a device: which attention backends work, which is the fastest, and what a block fuses.

A file for each device and set of versions, ``attention-*.json`` in ``FASTMAE_CACHE`` (default ``~/.cache/fastmae``). Delete it
to probe and measure again. Without a folder that can be written nothing is cached.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import json
from pathlib import Path

import torch
import triton

import fastmae.kernels
from fastmae.errors import InputError
from fastmae.files import cache_folder, write_atomically
from fastmae.lock import FolderLock
from fastmae.model.attention.backends import Shape, cudnn_version

PROBES, CHOICES, BLOCKS = "probes", "choices", "blocks"


def cache_file(device_type: str) -> Path | None:
    """The file for this device and these versions; None without a cache folder."""
    folder = cache_folder()
    name = hashlib.sha256(json.dumps(_identity(device_type)).encode()).hexdigest()[:16]
    return folder and folder / f"attention-{name}.json"


def entry_key(dtype: torch.dtype, shape: Shape) -> str:
    """The key of an entry."""
    return f"{dtype}: {shape}"


def read_entries(device_type: str, section: str) -> dict[str, dict]:
    """The entries of ``section`` by ``entry_key``; none if the file is missing or damaged."""
    path = cache_file(device_type)
    try:
        entries = json.loads(path.read_text())[section] if path else {}
        return {key: dict(entry) for key, entry in entries.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def write_entries(device_type: str, section: str, entries: dict[str, dict]) -> None:
    """Add ``entries`` to ``section``; those of the same key are replaced."""
    path = cache_file(device_type)
    if path is None:
        return
    lock = FolderLock(path.parent, "measurement")
    with contextlib.suppress(OSError, InputError):  # then every process measures for itself
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()  # entries that another process adds now would be lost
        try:
            sections = {name: read_entries(device_type, name) for name in (PROBES, CHOICES, BLOCKS)}
            sections[section] |= entries
            with write_atomically(path) as file:
                file.write(json.dumps({**_identity(device_type), **sections}, indent=1).encode())
        finally:
            lock.release()


def _identity(device_type: str) -> dict[str, str]:
    """What probes and measurements are valid for. Reading a GPU's name does not initialise it."""
    versions = {
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "triton": triton.__version__,
        "sources": _sources(),
    }
    with contextlib.suppress(RuntimeError):  # torch refuses this cuDNN
        versions["cudnn"] = str(cudnn_version())
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        versions["xformers"] = importlib.metadata.version("xformers")
    device = torch.cuda.get_device_name() if device_type == "cuda" else device_type
    return {"device": device, **versions}


@functools.cache
def _sources() -> str:
    """A digest of our kernels and of what a block is made of."""
    state = hashlib.sha256()
    for folder in (Path(fastmae.kernels.__file__).parent, Path(__file__).parent, Path(__file__).parents[1] / "block"):
        for path in sorted(folder.glob("*.py")):
            state.update(path.read_bytes())
    return state.hexdigest()[:16]
