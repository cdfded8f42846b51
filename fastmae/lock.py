"""The lock of a folder: two processes must not write the same checkpoints or shards."""

import contextlib
import errno
import fcntl
import os
import socket
import time
from pathlib import Path
from typing import BinaryIO

from fastmae.errors import InputError

LOCK = ".lock"
_HELD = (errno.EACCES, errno.EAGAIN)  # by another process
_LEASE = 120.0  # seconds; NFS drops the locks of a lost machine after about 90
_POLL = 0.2  # seconds between two attempts

_ours: dict[Path, int] = {}  # locks of this process, with its pid: a forked child inherits the entry but not the lock


class FolderLock:
    """Held from ``acquire`` to ``release``, or to the end of the process, however it ends.

    A POSIX record lock: the system releases it with its process, children do not inherit it, and NFS supports it. Within one
    process it does not exclude, and closing any handle of its file releases it: locks of this process are in a table as well.
    """

    def __init__(self, folder: Path, what: str = "run", advice: str = "give another --out"):
        """The error is "another ``what`` writes here, ...; wait for its end, or ``advice``"."""
        self.path, self.what, self.advice = folder / LOCK, what, advice
        self._key = self.path.resolve()
        self._file: BinaryIO | None = None

    def acquire(self, patience: float = 10.0) -> str | None:
        """Take the lock, waiting up to ``patience`` seconds, since a holder that was killed just now may not have ended; make
        the folder if it is missing. Return a warning if the file system has no locks.

        Raises InputError that names the process that holds it, OSError if the lock's file cannot be opened.
        """
        if _is_ours(self._key):
            raise self._refusal(_this_process())
        began = time.monotonic()
        while True:
            try:
                with contextlib.suppress(FileExistsError):
                    self.path.parent.mkdir()
                file = self.path.open("a+b", buffering=0)
            except FileNotFoundError:
                if not self.path.parent.parent.is_dir():
                    raise
                continue  # a holder has just removed the folder
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                owner = _owner(file)
                file.close()
                if error.errno not in _HELD:
                    return (
                        f"{self.path}: this file system has no locks ({error.strerror}); do not start a second {self.what} here"
                    )
                is_elsewhere = f" on {socket.gethostname()}" not in owner
                if time.monotonic() - began > (max(patience, _LEASE) if is_elsewhere and patience else patience):
                    raise self._refusal(owner) from error
                time.sleep(_POLL)
                continue
            if self._is_removed(file):  # with its folder, by the previous holder
                file.close()
                continue
            self._file = file
            _ours[self._key] = os.getpid()
            with contextlib.suppress(OSError):  # a full disk: locked all the same, but with no or an old owner
                file.truncate(0)
                file.write(_this_process().encode())
            return None

    def release(self) -> None:
        """Release the lock, if it is held."""
        if self._file is not None:
            self._file.close()
            self._file = None
            _ours.pop(self._key, None)

    def _refusal(self, owner: str) -> InputError:
        return InputError(f"{self.path.parent}: another {self.what} writes here, {owner}; wait for its end, or {self.advice}")

    def _is_removed(self, file: BinaryIO) -> bool:
        with contextlib.suppress(FileNotFoundError):
            return self.path.stat().st_ino != os.fstat(file.fileno()).st_ino
        return True


def lock_holder(folder: Path) -> str | None:
    """The process that holds the lock of ``folder``, as "process 7 on HOST"; None if there is none, or the file system has no
    locks, or the lock's file cannot be read. An ``acquire`` at the same moment waits for its next attempt."""
    path = folder / LOCK
    if _is_ours(path.resolve()):  # opening and closing the file would release the lock
        return _this_process()
    try:
        with path.open("rb", buffering=0) as file:
            try:
                fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError as error:
                return _owner(file) if error.errno in _HELD else None
    except OSError:
        pass
    return None


def _is_ours(path: Path) -> bool:
    return _ours.get(path) == os.getpid()


def _this_process() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


def _owner(file: BinaryIO) -> str:
    file.seek(0)
    return file.read(200).decode(errors="replace") or "unnamed"
