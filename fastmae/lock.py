"""The lock of a run's folder: two runs that write the same checkpoints would destroy each other's."""

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
_PATIENCE = 10.0  # seconds; a run that was killed just now may still be on its way out
_LEASE = 120.0  # seconds; NFS gives up the locks of a machine that is gone after about 90


class RunLock:
    """Held from ``acquire`` to ``release``, or to the end of the process, however it ends.

    A POSIX record lock: the system drops it with its process, children do not inherit it, and NFS knows it.
    """

    def __init__(self, folder: Path):
        self.path = folder / LOCK
        self._file: BinaryIO | None = None

    def acquire(self, patience: float = _PATIENCE) -> str | None:
        """Take the lock, waiting up to ``patience`` seconds; return a warning if the file system has no locks.

        Raises InputError that names the other process if there is one.
        """
        self._file = self.path.open("a+b", buffering=0)
        began = time.monotonic()
        while True:
            try:
                fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    return f"{self.path}: this file system has no locks ({error.strerror}); start no second run in this folder"
                is_elsewhere = f" on {socket.gethostname()}" not in self._owner()
                if time.monotonic() - began > (max(patience, _LEASE) if is_elsewhere and patience else patience):
                    raise InputError(
                        f"{self.path.parent}: another run writes here, {self._owner()}; wait for its end, or give another --out"
                    ) from error
                time.sleep(0.2)
            else:
                with contextlib.suppress(OSError):  # a full disk: held all the same, under an old name or none
                    self._file.truncate(0)
                    self._file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
                return None

    def release(self) -> None:
        """Give the lock back."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _owner(self) -> str:
        self._file.seek(0)
        return self._file.read(200).decode(errors="replace") or "unnamed"
