"""Files that are either complete or absent, and the folders that hold them."""

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from fastmae.errors import InputError
from fastmae.optional import require


def open_home(path: Path) -> Path:
    """``path``, its leading ``~`` or ``~NAME`` replaced by that user's home folder. Raises InputError if that is not known."""
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise InputError(f"{path}: the home folder of ~ is not known; give the full path") from error


@contextlib.contextmanager
def write_atomically(path: Path) -> Iterator[BinaryIO]:
    """A binary file that appears as ``path`` only when the block ends without an error, flushed to the disk.

    The block may also replace the file of its ``name``. Raises InputError if it cannot be opened; later failures, such as a
    full disk, stay OSErrors.
    """
    partial = path.with_name(f".{path.name}.partial")
    is_refused = False
    try:
        try:
            opened = partial.open("w+b")
        except OSError as error:
            is_refused = True
            raise InputError(f"{path}: cannot be written, {error.strerror}; choose another path") from error
        with opened as file:
            yield file
            mode = os.fstat(file.fileno()).st_mode
        partial.chmod(mode)  # what replaced it may be readable by its owner alone
        sync(partial)
        partial.replace(path)
        sync(path.parent)
    except BaseException:  # an interrupt may come while the file is being opened
        if not is_refused:
            with contextlib.suppress(OSError):
                partial.unlink()
        raise


def sync(path: Path) -> None:
    """Make what was written to the file ``path``, or renamed inside the folder ``path``, durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def digest(file: BinaryIO) -> str:
    """The xxh3-64 of all bytes of an open file, in hex."""
    file.seek(0)
    state = require("xxhash", "a file's digest").xxh3_64()
    while block := file.read(1 << 20):
        state.update(block)
    return state.hexdigest()


def make_folder(path: str | Path) -> Path:
    """``path`` as a folder that exists and can be written. Raises InputError that names it otherwise."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".writable-{socket.gethostname()}-{os.getpid()}"
        probe.touch()
        probe.unlink(missing_ok=True)
    except OSError as error:
        is_file = isinstance(error, FileExistsError)
        reason = "is a file, not a folder" if is_file else f"cannot be written, {error.strerror}"
        raise InputError(f"{path}: {reason}; choose another output folder") from error
    return path


def cache_folder() -> Path | None:
    """Where measurements and compiled code are kept between runs: ``FASTMAE_CACHE``, else ``fastmae`` in ``XDG_CACHE_HOME`` or
    ``~/.cache``; None without a home folder."""
    named = os.environ.get("FASTMAE_CACHE")
    try:
        return Path(named or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "fastmae").expanduser()
    except RuntimeError:  # neither HOME nor an entry for this user
        return None
