"""A copy of indexed shards on a machine's own disk, made before a run reads them.

``ROOT/FINGERPRINT`` holds the shards and, written last, an index of the same fingerprint: whoever reads it instead of the
original gets the same samples under the same numbers. A shard is written under a temporary name, its bytes are hashed on the
way, and it is renamed once its hash is that of the index; ``.staged`` notes its length, time of change and hash, so that a
copy that was interrupted goes on with the shards that lack. ``.lock`` lets one process copy at a time.
"""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path

import xxhash

from fastmae.errors import DataError, InputError
from fastmae.files import make_folder, write_atomically
from fastmae.shards.index import Index, Shard
from fastmae.shards.staged import NOTES, is_complete, is_there, lacking_bytes, names_in_copy, note_of, read_notes, staged_folder

_LOCK = ".lock"
_BLOCK = 4 << 20  # bytes that are read at once; a network file system likes large reads
_LOOK = 0.2  # seconds between two looks at a lock that another process holds


class Copy:
    """The copy of ``data`` under ``root``. ``run`` makes it, from one thread; the other attributes may be read meanwhile."""

    def __init__(self, data: str | Path, root: str | Path, threads: int = 8):
        """``data``: a folder of indexed shards; ``threads``: shards that are copied at the same time."""
        self.data, self.root, self.threads = Path(data), Path(root), threads
        self.total = self.copied = self.skipped = 0
        """Bytes: of all shards, those copied or found whole by now, and those of them that were there already."""
        self.waits_for: str | None = None
        """The process that is copying at the moment, while this one waits for it."""
        self._stop = threading.Event()
        self._counting = threading.Lock()

    def stop(self) -> None:
        """Have ``run`` end soon; shards that are complete stay."""
        self._stop.set()

    def run(self) -> Path | None:
        """The folder of the copy once it is complete; None if it was stopped before.

        Raises DataError if the original cannot be read or is not what its index says, InputError if the copy cannot be
        written, before anything is copied if there is too little space.
        """
        index = Index.load(self.data)
        folder = staged_folder(self.root, index)
        self.total = sum(shard.bytes for shard in index.shards)
        if is_complete(folder, index):  # without the lock, which another user may hold or own
            self.copied = self.skipped = self.total
            return folder
        make_folder(folder)
        with self._lock(folder):
            if not self._stop.is_set():
                self._copy(index, folder)
        return None if self._stop.is_set() else folder

    def _copy(self, index: Index, folder: Path) -> None:
        names = names_in_copy(index)
        noted = read_notes(folder / NOTES)
        for partial in folder.glob(".*.partial"):
            partial.unlink()
        self._check_space(index, folder)
        notes = _Notes(folder)
        with ThreadPoolExecutor(self.threads) as pool:
            jobs = [
                pool.submit(self._shard, index.folder / shard.name, folder / name, shard, noted.get(name))
                for name, shard in zip(names, index.shards, strict=True)
            ]
            try:
                for job in as_completed(jobs):
                    if note := job.result():
                        notes.add(note)
            except BaseException:
                self._stop.set()
                raise
            finally:
                notes.close()
        if not self._stop.is_set():
            shards = tuple(replace(shard, name=name) for name, shard in zip(names, index.shards, strict=True))
            with _explaining_a_full_disk(folder, index.table.nbytes):
                replace(index, folder=folder, shards=shards).save()

    def _shard(self, source: Path, target: Path, shard: Shard, note: list | None) -> list | None:
        """Copy one shard, unless it is there; what is to be noted of it. None if the copy is stopped."""
        if self._stop.is_set():
            return None
        if is_there(target, shard, note):
            self._count(shard.bytes, skipped=shard.bytes)
            return note_of(target, shard)
        state, size = xxhash.xxh3_64(), 0
        try:
            with _explaining_a_full_disk(target, shard.bytes), write_atomically(target) as file:
                for block in _blocks(source):
                    if self._stop.is_set():
                        raise _StoppedError
                    state.update(block)
                    file.write(block)
                    size += len(block)
                    self._count(len(block))
                if (size, state.hexdigest()) != (shard.bytes, shard.xxh3):
                    raise DataError(
                        f"{source}: its {size} bytes are not those that were indexed (hash {state.hexdigest()}, the index says "
                        f"{shard.xxh3}); restore it, or index the shards again; `fastmae shards verify` names what is damaged"
                    )
        except _StoppedError:
            return None
        return note_of(target, shard)

    def _count(self, count: int, skipped: int = 0) -> None:
        with self._counting:
            self.copied += count
            self.skipped += skipped

    def _check_space(self, index: Index, folder: Path) -> None:
        """Raise InputError unless what lacks fits the disk."""
        needed, free = lacking_bytes(index, folder), shutil.disk_usage(folder).free
        if needed > free:
            others = sorted(str(p.parent) for p in self.root.glob(f"*/{NOTES}") if p.parent != folder)
            older = f" (remove copies that no run uses: {', '.join(others[:3])})" if others else ""
            raise InputError(
                f"{folder}: no room for the copy of {index.folder}: {needed} bytes are needed, {free} bytes are free; make "
                f"room{older}, or give another --stage"
            )

    @contextlib.contextmanager
    def _lock(self, folder: Path) -> Iterator[None]:
        """Held by one process of this machine at a time; the system drops it with its process."""
        try:
            handle = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise InputError(f"{folder / _LOCK}: cannot be written, {error.strerror}; give another --stage") from error
        try:
            while not self._stop.is_set():
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    self.waits_for = os.pread(handle, 200, 0).decode(errors="replace") or "another process"
                    self._stop.wait(_LOOK)
                except OSError as error:  # a network file system without locks
                    raise InputError(
                        f"{folder / _LOCK}: cannot be locked, {error.strerror}; give a --stage on the machine's own disk"
                    ) from error
            self.waits_for = None
            if not self._stop.is_set():
                os.ftruncate(handle, 0)
                with contextlib.suppress(OSError):  # a full disk: held all the same
                    os.pwrite(handle, f"process {os.getpid()}".encode(), 0)
            yield
        finally:
            os.close(handle)


class _StoppedError(Exception):
    """The copy was asked to stop."""


class _Notes:
    """The file of notes, added to. A full disk takes none: shards without one are hashed by the next start."""

    def __init__(self, folder: Path):
        with _explaining_a_full_disk(folder / NOTES, 0):
            self._file = (folder / NOTES).open("ab", buffering=0)
        self._write("\n")  # a line that a kill has cut stays alone

    def add(self, note: list) -> None:
        self._write(json.dumps(note) + "\n")

    def close(self) -> None:
        self._file.close()

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError):
            self._file.write(text.encode())


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
def _explaining_a_full_disk(path: Path, size: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise InputError(f"{path}: cannot be written, {error.strerror or error}; give another --stage") from error
        raise InputError(
            f"{path}: no space left for its {size} bytes ({shutil.disk_usage(path.parent).free} bytes are free), others write "
            "there too; make room and start again, complete shards stay; or give another --stage"
        ) from error
