"""What torch.compile has made, kept for the next start: on another node, after a requeue, in a fresh container.

Inductor and Triton keep their results in folders. Here these are on the node's own disk (``use_local_folders``), because
hundreds of processes that write thousands of small files would stall a network file system, and the node may be another one
next time. So after a first step it goes into one file (``torch.compiler.save_cache_artifacts``), which every start reads.

That file holds code, which is executed. It therefore lies in the user's own cache folder and never in a run's, which may come
from elsewhere, and it is read only if it belongs to this user and nobody else can write it.
"""

import contextlib
import hashlib
import json
import os
import platform
import stat
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import BinaryIO

import torch
import triton
import xxhash

import fastmae.model
from fastmae.devices import device_name
from fastmae.errors import InputError
from fastmae.files import cache_folder, write_atomically
from fastmae.kernels import dispatch
from fastmae.train.config.recipes import Recipe
from fastmae.train.config.run import Run
from fastmae.train.distributed.world import World

_MAGIC = b"fastmae compiled 1\n"
_UNUSED = 30 * 86400.0  # seconds after which a file that no start has read is removed
_DIGITS = 16  # of an xxh3-64 in hex
_VARIABLES = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}


def use_local_folders(device: torch.device) -> Path | None:
    """Have Inductor and Triton keep their results in a folder of this user, machine's own disk and versions; return it.

    Variables that are set are left as they are. By default Inductor asks for the user's name and Triton for a home folder,
    which containers may lack. None if there is no folder that could be used; torch then finds its own.
    """
    if all(os.environ.get(name) for name in _VARIABLES):
        return None
    try:
        folder = _private(Path(tempfile.gettempdir()) / f"fastmae-{os.geteuid()}")
        folder = folder or Path(tempfile.mkdtemp(prefix=f"fastmae-{os.geteuid()}-"))
        folder = folder / f"compiled-{_hash(_identity(device))}"
        folder.mkdir(exist_ok=True)
    except OSError:  # no temporary folder that could be written
        return None
    for name, subfolder in _VARIABLES.items():
        if not os.environ.get(name):
            os.environ[name] = str(folder / subfolder)
    return folder


class CompileCache:
    """The file of one run's compiled code for one kind of device. All ranks make it together, before the first step."""

    def __init__(self, recipe: Recipe, run: Run, world: World):
        is_off = run.compile == "off" or (run.compile == "auto" and world.device.type == "cpu")
        folder = None if is_off else cache_folder()
        self.path = folder and folder / f"compiled-{_hash(_program(recipe, run, world))}.bin"
        self._known: set[tuple[str, str]] = set()
        # Code differs by the device's number as well. Of the ranks that share a file the first one writes it.
        files = world.gather([str(self.path)])
        self._writes = self.path is not None and files.index(str(self.path)) == world.rank
        self._notes = not is_off and folder is None

    def load(self) -> list[str]:
        """Load what an earlier start has kept; lines about it for the log."""
        if self._notes:
            return ["compiled code is not kept for the next start: there is no home folder; set FASTMAE_CACHE to a folder"]
        if self.path is None:
            return []
        try:
            with _open_own(self.path) as file:
                artifacts = _checked(file.read())
            info = torch.compiler.load_cache_artifacts(artifacts)
        except FileNotFoundError:
            return []
        except Exception as error:  # torch's own as well: whatever it finds wrong costs time alone
            return [f"{self.path}: compiled code is not loaded from there, {getattr(error, 'strerror', None) or error}"]
        with contextlib.suppress(OSError):  # a read-only cache
            os.utime(self.path)  # in use
        self._known = _keys(info)
        return [f"compiled code of an earlier start: {self.path}"] if self._known else []

    def save(self) -> list[str]:
        """Keep what was compiled in this process, if there is anything new; lines about it for the log."""
        if not self._writes or (made := torch.compiler.save_cache_artifacts()) is None:
            return []
        artifacts, info = made
        if _keys(info) <= self._known:
            return []
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with write_atomically(self.path) as file:
                os.fchmod(file.fileno(), 0o600)
                file.write(_MAGIC + xxhash.xxh3_64_hexdigest(artifacts).encode() + artifacts)
        except (OSError, InputError) as error:  # the next start compiles again
            return [f"{self.path}: compiled code cannot be kept there, {getattr(error, 'strerror', None) or error}"]
        self._known = _keys(info)
        _remove_unused(self.path.parent)
        return [f"compiled code is kept for the next start: {self.path}, {len(artifacts) / 1e6:.1f} MB"]


def _remove_unused(folder: Path) -> None:
    """Remove the files of programs not started for long: each change of settings, sources or versions makes another."""
    for path in [*folder.glob("compiled-*.bin"), *folder.glob(".compiled-*.bin.partial")]:
        with contextlib.suppress(OSError):  # another process's to remove, or done by it
            if path.lstat().st_mtime < time.time() - _UNUSED:
                path.unlink()


def _private(folder: Path) -> Path | None:
    """``folder``, made if it is not there; None if it is another user's, or others can write it."""
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    is_ours = stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o022
    return folder if is_ours else None


@contextlib.contextmanager
def _open_own(path: Path) -> Iterator[BinaryIO]:
    """A file of this user that nobody else can write. Raises ValueError on others."""
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    with open(handle, "rb") as file:  # noqa: PTH123
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
            raise ValueError(
                f"it belongs to user {found.st_uid}, mode {stat.S_IMODE(found.st_mode):o}, and code is run only from a file of "
                "one's own that nobody else can write; remove it"
            )
        yield file


def _checked(data: bytes) -> bytes:
    """The artifacts of a file's bytes. Raises ValueError if they are not as they were written."""
    head = len(_MAGIC) + _DIGITS
    artifacts = data[head:]
    if data[:head] != _MAGIC + xxhash.xxh3_64_hexdigest(artifacts).encode():
        raise ValueError("it is damaged; the code is compiled again")
    return artifacts


def _keys(info: object) -> set[tuple[str, str]]:
    """Kind and key of every artifact."""
    return {(kind, key) for kind, keys in info.artifacts.items() for key in keys} if info is not None else set()


def _identity(device: torch.device) -> list:
    """What compiled code is valid for. Of our operators torch compares the graphs they stand in, not their own source."""
    sources = [p for module in (fastmae.model, dispatch) for p in sorted(Path(module.__file__).parent.rglob("*.py"))]
    state = xxhash.xxh3_64()
    for path in sources:
        state.update(path.read_bytes())
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    versions = [torch.__version__, torch.version.cuda, triton.__version__, platform.python_version()]
    return [versions, device_name(device), capability, state.hexdigest()]


def _program(recipe: Recipe, run: Run, world: World) -> list:
    """What distinguishes the programs of runs; torch compares more itself, so that a collision costs time alone."""
    settings = [run.batch_size, run.precision, run.compile, run.parallel, run.reduce, run.cuda_graphs, recipe.mask_ratio]
    return [_identity(world.device), str(world.device), asdict(recipe.model), recipe.progressive, settings, world.size > 1]


def _hash(value: list) -> str:
    return hashlib.sha256(json.dumps(value, default=str).encode()).hexdigest()[:16]
