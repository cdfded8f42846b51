"""Stage indexed shards: copy them to a machine's own disk before a run reads them.

``ROOT/FINGERPRINT`` holds the shards and, written last, an index of the same fingerprint: reading it gives the same samples
under the same numbers. A shard is written under a temporary name, hashed on the way, and renamed once its hash is that of the
index; ``.staged`` (``staged.py``) records it, so that an interrupted copy resumes with the missing shards. ``.lock`` lets one
process copy at a time.
"""

import contextlib
import errno
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path

import xxhash

from fastmae.errors import DataError, InputError
from fastmae.files import make_folder, write_atomically
from fastmae.lock import FolderLock, lock_holder
from fastmae.shards.index import Index, Shard
from fastmae.shards.staged import (
    MANIFEST,
    Manifest,
    is_complete,
    is_complete_shard,
    lacking_bytes,
    names_in_copy,
    record_of,
    staged_folder,
)

_BLOCK = 4 << 20  # bytes that are read at once; a network file system likes large reads
_POLL = 0.2  # seconds between two attempts to take a lock that another process holds


class Copy:
    """The copy of ``data`` under ``root``. ``run`` makes it, from one thread; the other attributes may be read meanwhile."""

    def __init__(self, data: str | Path, root: str | Path, threads: int = 8):
        """``data``: a folder of indexed shards; ``threads``: shards that are copied at the same time."""
        self.data, self.root, self.threads = Path(data), Path(root), threads
        self.total = self.copied = self.skipped = 0
        """Bytes: of all shards; copied or found complete so far; and of the latter, those that an earlier copy had made."""
        self.waits_for: str | None = None
        """The process that holds the lock, as "process 7 on HOST", while this one waits for it."""
        self._stop = threading.Event()
        self._counting = threading.Lock()

    def stop(self) -> None:
        """Make ``run`` return soon; complete shards are kept."""
        self._stop.set()

    def run(self) -> Path | None:
        """The folder of the copy once it is complete; None if it was stopped before.

        Raises DataError if the original cannot be read or does not match its index, InputError if the copy cannot be written;
        too little disk space is found before anything is copied.
        """
        index = Index.load(self.data)
        folder = staged_folder(self.root, index)
        self.total = sum(shard.bytes for shard in index.shards)
        if is_complete(folder, index):  # without the lock, which another user may hold or own
            self.copied = self.skipped = self.total
            return folder
        make_folder(folder)
        with self._locked(folder):
            if not self._stop.is_set():
                self._copy(index, folder)
        return None if self._stop.is_set() else folder

    def _copy(self, index: Index, folder: Path) -> None:
        names = names_in_copy(index)
        for partial in folder.glob(".*.partial"):
            partial.unlink()
        self._check_space(index, folder)
        with _explaining_disk_errors(folder / MANIFEST, 0):
            manifest = Manifest(folder)
        with contextlib.closing(manifest), ThreadPoolExecutor(self.threads) as pool:
            jobs = [
                pool.submit(self._shard, index.folder / shard.name, folder / name, shard, manifest.records.get(name))
                for name, shard in zip(names, index.shards, strict=True)
            ]
            try:
                for job in as_completed(jobs):
                    if record := job.result():
                        manifest.add(record)
            except BaseException:
                self._stop.set()
                raise
        if not self._stop.is_set():
            shards = tuple(replace(shard, name=name) for name, shard in zip(names, index.shards, strict=True))
            with _explaining_disk_errors(folder, index.table.nbytes):
                replace(index, folder=folder, shards=shards).save()

    def _shard(self, source: Path, target: Path, shard: Shard, record: list | None) -> list | None:
        """Copy one shard, unless it is complete; its record for the manifest. None if the copy is stopped."""
        if self._stop.is_set():
            return None
        if is_complete_shard(target, shard, record):
            self._count(shard.bytes, skipped=shard.bytes)
            return record_of(target, shard)
        state, size = xxhash.xxh3_64(), 0
        try:
            with _explaining_disk_errors(target, shard.bytes), write_atomically(target) as file:
                for block in _blocks(source):
                    if self._stop.is_set():
                        raise _StoppedError
                    state.update(block)
                    file.write(block)
                    size += len(block)
                    self._count(len(block))
                if (size, state.hexdigest()) != (shard.bytes, shard.xxh3):
                    raise DataError(
                        f"{source}: does not match its index: {size} bytes of hash {state.hexdigest()}, the index states "
                        f"{shard.bytes} of {shard.xxh3}; `fastmae shards verify` checks all shards; restore it, or index again"
                    )
        except _StoppedError:
            return None
        return record_of(target, shard)

    def _count(self, count: int, skipped: int = 0) -> None:
        with self._counting:
            self.copied += count
            self.skipped += skipped

    def _check_space(self, index: Index, folder: Path) -> None:
        """Raise InputError unless the missing shards fit the disk."""
        needed, free = lacking_bytes(index, folder), shutil.disk_usage(folder).free
        if needed > free:
            others = sorted(str(p.parent) for p in self.root.glob(f"*/{MANIFEST}") if p.parent != folder)
            older = f" (remove copies that no run uses: {', '.join(others[:3])})" if others else ""
            raise InputError(
                f"{folder}: not enough disk space for the copy of {index.folder}: {needed} bytes are needed, {free} bytes are "
                f"free; free some{older}, or give another --stage"
            )

    @contextlib.contextmanager
    def _locked(self, folder: Path) -> Iterator[None]:
        """Hold the lock of ``folder``, unless the copy is stopped while another process holds it."""
        lock = FolderLock(folder, "copy", "give another --stage")
        while not self._stop.is_set():
            try:
                warning = lock.acquire(patience=0)
            except InputError:  # held
                self.waits_for = lock_holder(folder) or "another process"
                self._stop.wait(_POLL)
                continue
            except OSError as error:
                raise InputError(f"{lock.path}: cannot be written, {error.strerror}; give another --stage") from error
            if warning:
                raise InputError(f"{warning}; give a --stage on the machine's own disk")
            break
        self.waits_for = None
        try:
            yield
        finally:
            lock.release()


class _StoppedError(Exception):
    """The copy was asked to stop."""


def _blocks(source: Path) -> Iterator[memoryview]:
    """The bytes of a file, block by block, each in the memory of the one before."""
    memory = memoryview(bytearray(_BLOCK))
    try:
        with source.open("rb", buffering=0) as file:
            while count := file.readinto(memory):
                yield memory[:count]
    except OSError as error:
        raise DataError(f"{source}: cannot be read, {error.strerror}") from error


@contextlib.contextmanager
def _explaining_disk_errors(path: Path, size: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise InputError(f"{path}: cannot be written, {error.strerror or error}; give another --stage") from error
        raise InputError(
            f"{path}: no space left on the disk for its {size} bytes ({shutil.disk_usage(path.parent).free} bytes are free); "
            "free some and start again, complete shards are kept; or give another --stage"
        ) from error
