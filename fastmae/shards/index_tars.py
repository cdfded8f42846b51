"""Index tars that others wrote, so that they are read at random like our own."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import xxhash

from fastmae.errors import DataError, InputError
from fastmae.files import make_folder
from fastmae.map_ordered import map_ordered
from fastmae.shards.index import JSON_NAME, ROW, Index, Shard, checksum
from fastmae.shards.journal import UNFINISHED
from fastmae.shards.samples import list_samples


def index_shards(
    source: str | Path,
    out: str | Path | None = None,
    *,
    classes: tuple[str, ...] = (),
    workers: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Index:
    """Write an index for the tars ``*.tar`` of the folder ``source`` into ``out``, or beside them; return it.

    ``classes``: names of the class numbers, if there are any. ``workers`` processes read, 0 does it here; the index is the
    same. ``progress(done, total)`` is called after each shard. ``build["without_image"]`` counts the samples skipped. Raises
    InputError if there is nothing to index or an index that must not be replaced, DataError on the first shard that is
    damaged or that cannot be indexed.
    """
    source = Path(source)
    paths = list_tars(source)
    out = make_folder(source if out is None else out)
    _check_replaceable(out)
    shards, tables = [], []
    without = 0
    of_hash: dict[str, Path] = {}
    for number, (path, found) in enumerate(zip(paths, map_ordered(_scan, paths, workers), strict=True)):
        if found.xxh3 in of_hash:
            raise DataError(
                f"{path}: the same bytes as {of_hash[found.xxh3]}, its samples would come twice; remove one of them"
            )
        of_hash[found.xxh3] = path
        largest = found.table["label"].max()
        if classes and largest >= len(classes):
            raise InputError(f"{path}: holds class number {largest}, {len(classes)} class names were given; name all classes")
        found.table["shard"] = number
        name = os.path.relpath(source.resolve() / path.name, out.resolve())
        shards.append(Shard(name=name, bytes=found.bytes, samples=len(found.table), xxh3=found.xxh3))
        tables.append(found.table)
        without += found.without_image
        if progress:
            progress(number + 1, len(paths))
    build = {"indexed": True, "without_image": without}
    index = Index(folder=out, shards=tuple(shards), table=np.concatenate(tables), classes=tuple(classes), build=build)
    index.save()
    return index


def list_tars(folder: Path) -> list[Path]:
    """The tars of a folder in the order of their names. Raises InputError if there are none, or not all of them yet."""
    if not folder.is_dir():
        raise InputError(f"{folder}: not a folder; give a folder of tars")
    _check_finished(folder)
    tars = sorted(p for p in folder.glob("*.tar") if not p.name.startswith("."))
    if not tars:
        has_packed = any(p.name.endswith((".tar.gz", ".tgz")) for p in folder.iterdir())
        hint = (
            "compressed ones cannot be read at random: gunzip them, or stream them" if has_packed else "give a folder of tars"
        )
        raise InputError(f"{folder}: no *.tar in it; {hint}")
    return tars


class _Scan(NamedTuple):
    """What one tar holds."""

    bytes: int
    xxh3: str
    table: np.ndarray
    without_image: int


def _scan(path: Path) -> _Scan:
    samples, without = list_samples(path)
    state = xxhash.xxh3_64()
    checks = []
    try:
        with path.open("rb") as file:
            for sample in samples:  # all of the tar is read once, from start to end
                _read_on(file, sample.offset - file.tell(), state)
                data = file.read(sample.size)
                state.update(data)
                checks.append(checksum(data))
            size = os.fstat(file.fileno()).st_size
            _read_on(file, size - file.tell(), state)
    except OSError as error:
        raise DataError(f"{path}: cannot be read, {error.strerror}; restore it") from error
    rows = [(0, s.size, s.offset, s.label, check) for s, check in zip(samples, checks, strict=True)]
    return _Scan(size, state.hexdigest(), np.array(rows, dtype=ROW), without)


def _read_on(file: BinaryIO, count: int, state: xxhash.xxh3_64) -> None:
    while count > 0 and (block := file.read(min(count, 1 << 20))):
        state.update(block)
        count -= len(block)


def _check_replaceable(folder: Path) -> None:
    """Only an index that came from indexing, or that no longer serves, may be replaced."""
    _check_finished(folder)
    if not (folder / JSON_NAME).exists():
        return
    try:
        index = Index.load(folder, check_shards=False)
    except DataError:
        return
    if not index.build.get("indexed"):
        raise InputError(
            f"{folder}: has an index already, from building its shards; use it, or choose another folder with --out"
        )


def _check_finished(folder: Path) -> None:
    if (folder / UNFINISHED).exists():
        raise InputError(f"{folder}: the build of these shards was not finished; the same `fastmae shards build` continues it")
