"""The journal of an unfinished build: its settings, its finished shards, and the lock of the process that builds.

A folder of shards has a subfolder ``.unfinished`` while it is being built: ``plan.json`` (the settings, and a hash of the list
of images), ``shard-000000.json`` for each finished shard (rows of the index, length and hash of the tar, bad images), and the
lock. A build that was killed resumes from there, and its result is identical to that of an uninterrupted one.
"""

import contextlib
import json
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from fastmae.errors import InputError
from fastmae.files import digest, write_atomically
from fastmae.images.listing import Listing
from fastmae.lock import FolderLock
from fastmae.shards.index import FORMAT, JSON_NAME, ROW, Shard

UNFINISHED = ".unfinished"
_PLAN, _REMOVED = "plan.json", f"{UNFINISHED}.removed"
_STALE = (".shard-*.partial", ".index.*.partial", ".plan.*.partial", ".writable-*")  # temporary files of a killed build
_PATIENCE = 1.0  # seconds to wait for the lock: a build that was killed just now releases it in a moment


@dataclass(frozen=True, kw_only=True)
class Built:
    """A finished shard."""

    shard: Shard
    """Without samples, and without a tar, if none of its images can be read."""
    table: np.ndarray
    """(samples,) of ``ROW``; its shard column is not set."""
    bad: list[str]
    """A line for each image that cannot be read."""


@dataclass(frozen=True)
class Plan:
    """The unfinished build in ``out``, locked by this process."""

    out: Path

    @property
    def folder(self) -> Path:
        """The folder of the journal."""
        return self.out / UNFINISHED

    def finish(self, number: int, built: Built) -> None:
        """Record that shard ``number`` is complete."""
        document = {"shard": vars(built.shard), "rows": built.table.tolist(), "bad": built.bad}
        _write(self._record(number), document)

    def finished(self, number: int) -> Built | None:
        """The record of shard ``number``, if its tar is there and its bytes have not changed."""
        try:
            document = _read(self._record(number))
            table = np.array([tuple(row) for row in document["rows"]], dtype=ROW)
            built = Built(shard=Shard(**document["shard"]), table=table, bad=document["bad"])
            if built.shard.samples:
                path = self.out / built.shard.name
                if path.stat().st_size != built.shard.bytes:
                    return None
                with path.open("rb") as file:
                    if digest(file) != built.shard.xxh3:
                        return None
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return built

    def remove(self) -> None:
        """Remove the journal: the build is finished, or cannot be resumed."""
        self.folder.rename(self.out / _REMOVED)  # atomic: a reader sees a finished build or a resumable one
        shutil.rmtree(self.out / _REMOVED, ignore_errors=True)

    def _record(self, number: int) -> Path:
        return self.folder / f"shard-{number:06d}.json"


@contextlib.contextmanager
def hold_plan(out: Path, settings: dict, listing: Listing) -> Iterator[Plan]:
    """The plan of building ``listing`` into the folder ``out``, new or resumed, under the lock of its journal.

    Raises InputError if the folder holds shards but no unfinished build, or one of other settings or images, or if another
    process is building there.
    """
    if not (out / UNFINISHED).exists():
        _refuse_shards(out)
    with _locked(out):
        plan = Plan(out)
        try:
            _refuse_shards(out)  # the process that held the lock before may have finished, or may have been killed just here
        except InputError:
            plan.remove()
            raise
        now = {"settings": {**settings, "format": FORMAT}, "images": len(listing.sources), "listing": listing.xxh3}
        path = plan.folder / _PLAN
        if path.exists():
            _refuse_other(out, path, now)
        else:
            _write(path, now)
        for stale in [p for folder in (out, plan.folder) for pattern in _STALE for p in folder.glob(pattern)]:
            stale.unlink(missing_ok=True)
        yield plan


def _refuse_shards(out: Path) -> None:
    shutil.rmtree(out / _REMOVED, ignore_errors=True)  # of a build that was killed while it removed its journal
    if not (out / UNFINISHED / _PLAN).exists() and ((out / JSON_NAME).exists() or any(out.glob("*.tar"))):
        raise InputError(f"{out}: holds shards already; choose an empty folder, or remove it first")


def _refuse_other(out: Path, path: Path, now: dict) -> None:
    try:
        then = _read(path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: damaged, {error}; remove the folder {out} and build again") from error
    was, is_now = then["settings"], now["settings"]
    changed = [f"{n} was {was.get(n)!r}, now {is_now.get(n)!r}" for n in {**was, **is_now} if was.get(n) != is_now.get(n)]
    if changed:
        raise InputError(
            f"{out}: holds an unfinished build with other settings: {'; '.join(changed)}; give the same settings to resume it, "
            "or remove the folder to build again"
        )
    if then != now:
        what = f"it had {then['images']} images, now {now['images']}"
        if then["images"] == now["images"]:
            what = "the path, length or time of change of at least one has changed"
        raise InputError(
            f"{out}: holds an unfinished build of other images: {what}; restore them to resume it, or remove the folder to "
            "build again"
        )


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Hold the lock of the unfinished build in ``out``. Raises InputError that names its holder."""
    lock = FolderLock(out / UNFINISHED, "build", "choose another folder")
    if warning := lock.acquire(_PATIENCE):
        warnings.warn(warning, stacklevel=4)
    try:
        yield
    finally:
        lock.release()


def _write(path: Path, content: dict) -> None:
    document = {"content": content, "xxh3": _hash(content)}
    with write_atomically(path) as file:
        file.write(json.dumps(document).encode())


def _read(path: Path) -> dict:
    """The content that was written. Raises OSError, ValueError, KeyError or TypeError if it is missing or damaged."""
    document = json.loads(path.read_bytes())
    if document["xxh3"] != _hash(document["content"]):
        raise ValueError("its contents do not match their own hash")
    return document["content"]


def _hash(content: dict) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(content).encode())
