"""Build shards: a folder of images becomes webdataset tars and an index.

Images are listed in the order of their paths, shuffled once by the seed, split into shards of a fixed number, recoded in
worker processes and written in that order: the same input gives the same bytes, whatever the number of workers, and however
often the build was killed and started again. A shard appears under its name only when it is complete, and the index only when
all are.
"""

import re
import tarfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import asdict
from functools import partial
from itertools import chain, islice
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import numpy as np

from fastmae.errors import InputError, WorkerError
from fastmae.files import digest, make_folder, write_atomically
from fastmae.images.listing import Listing, Source, list_images
from fastmae.images.recode import Recode, recode
from fastmae.kernels.philox import SHARDS, permutation
from fastmae.map_ordered import map_ordered
from fastmae.seeds import check_seed
from fastmae.shards.index import ROW, Index, Shard, checksum
from fastmae.shards.journal import Built, Plan, hold_plan

# A task of a worker: at most so many images, and none after so many bytes of them; less than a shard, to keep all at work.
_IMAGES, _BYTES = 8, 1 << 20


def write_shards(
    source: str | Path,
    out: str | Path,
    settings: Recode = Recode(),  # noqa: B008 - frozen
    *,
    samples_per_shard: int = 1000,
    seed: int = 0,
    workers: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Index, list[str]]:
    """Write the images under ``source`` as shards under ``out``; return the index and a line for each bad image.

    A top-level folder of ``source`` is a class; images outside one have no label. ``workers`` processes recode, 0 does it
    here. ``progress(done, total)`` is called after each image, and after each shard that stands from before: a build that was
    killed continues when it is called again with the same source, settings and ``out``. Raises InputError if there is no image
    that opens, if ``out`` holds other shards or another process builds there, or if workers die again and
    again.
    """
    check_seed(seed)
    if samples_per_shard < 1:
        raise InputError(f"samples per shard must be at least 1, got {samples_per_shard}")
    listing = list_images(Path(source))
    out = make_folder(out)
    build = {**asdict(settings), "samples_per_shard": samples_per_shard, "seed": seed}
    with hold_plan(out, build, listing) as plan:
        order = permutation(seed, SHARDS, 0, len(listing.sources)).tolist()
        chunks = [order[i : i + samples_per_shard] for i in range(0, len(order), samples_per_shard)]
        parts = _build(plan, listing, chunks, settings, workers, progress or (lambda done, total: None))
        bad = [line for part in parts for line in part.bad]
        parts = [part for part in parts if part.shard.samples]
        if not parts:
            plan.remove()
            raise InputError(f"{source}: none of its {len(listing.sources)} images can be read; the first: {bad[0]}")
        for number, part in enumerate(parts):
            part.table["shard"] = number
        table = np.concatenate([part.table for part in parts])
        shards = tuple(part.shard for part in parts)
        build["bad"] = len(bad)
        index = Index(folder=out, shards=shards, table=table, classes=tuple(listing.classes), build=build)
        index.save()
        plan.remove()
    return index, bad


def _build(plan: Plan, listing: Listing, chunks: list[list[int]], settings: Recode, workers: int,
           progress: Callable[[int, int], None]) -> list[Built]:  # fmt: skip
    """Every shard, those that stand from before as they are."""
    total = len(listing.sources)
    done = 0
    parts: dict[int, Built] = {}
    for number, chunk in enumerate(chunks):
        if part := plan.finished(number):
            parts[number] = part
            done += len(chunk)
            progress(done, total)
    missing = [number for number in range(len(chunks)) if number not in parts]
    sources = (listing.sources[i] for number in missing for i in chunks[number])

    def counted() -> Iterator[tuple[Source, bytes | str]]:
        nonlocal done
        for image in images:
            done += 1
            progress(done, total)
            yield image

    try:
        with closing(recode_all(sources, settings, workers)) as images:
            results = counted()
            for number in missing:
                parts[number] = _write_shard(plan.out, number, islice(results, len(chunks[number])))
                plan.finish(number, parts[number])
    except WorkerError as error:
        raise InputError(
            f"{plan.out}: {error}; {len(parts)} of {len(chunks)} shards are finished, and the same command continues from there"
        ) from error
    return [parts[number] for number in range(len(chunks))]


def recode_all(sources: Iterable[Source], settings: Recode, workers: int) -> Iterator[tuple[Source, bytes | str]]:
    """Each source in order with its JPEG bytes or why there are none; close it if it is not read to its end."""
    tasks = _tasks(sources) if workers else ([source] for source in sources)
    with closing(map_ordered(partial(_recode_task, settings), tasks, workers, name=_names)) as done:
        for task in done:
            yield from task


def _tasks(sources: Iterable[Source]) -> Iterator[list[Source]]:
    task: list[Source] = []
    held = 0
    for source in sources:
        task.append(source)
        held += source.bytes
        if len(task) == _IMAGES or held > _BYTES:
            yield task
            task, held = [], 0
    if task:
        yield task


def _names(task: list[Source]) -> str:
    return f"one of {', '.join(source.name for source in task)}"


def _recode_task(settings: Recode, task: list[Source]) -> list[tuple[Source, bytes | str]]:
    return [(source, _recode_one(source, settings)) for source in task]


def _recode_one(source: Source, settings: Recode) -> bytes | str:
    try:
        return recode(source.path, settings)
    except Exception as error:  # the image is named and counted, and no image ends the build
        return str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"


def _write_shard(out: Path, number: int, images: Iterator[tuple[Source, bytes | str]]) -> Built:
    """One tar, that appears when it is complete; none if no image of it can be read."""
    path = out / f"shard-{number:06d}.tar"
    bad: list[str] = []
    readable = _readable(images, bad)
    if (first := next(readable, None)) is None:  # an empty tar would only trouble readers
        path.unlink(missing_ok=True)
        return Built(shard=Shard(name=path.name, bytes=0, samples=0, xxh3=""), table=np.empty(0, ROW), bad=bad)
    with write_atomically(path) as file:
        rows = [_append(file, source, data) for source, data in chain([first], readable)]
        file.write(bytes(1024))  # two zero blocks end a tar
        size = file.tell()
        xxh3 = digest(file)
    shard = Shard(name=path.name, bytes=size, samples=len(rows), xxh3=xxh3)
    return Built(shard=shard, table=np.array(rows, dtype=ROW), bad=bad)


def _readable(images: Iterator[tuple[Source, bytes | str]], bad: list[str]) -> Iterator[tuple[Source, bytes]]:
    for source, data in images:
        if isinstance(data, str):
            bad.append(f"{source.path}: {data}")
        else:
            yield source, data


def _append(file: BinaryIO, source: Source, data: bytes) -> tuple[int, int, int, int, int]:
    """Write one sample's members; return its row of the index, whose shard is numbered when all are known."""
    # A key without dots, which webdataset cuts at, and short enough for a plain tar header; the number makes it unique.
    relative = PurePosixPath(source.name).with_suffix("").as_posix()
    key = f"{source.number:08d}_{re.sub('[^A-Za-z0-9_-]', '_', relative)[-80:]}"
    if source.label >= 0:
        _append_member(file, f"{key}.cls", str(source.label).encode())
    offset = _append_member(file, f"{key}.jpg", data)
    return 0, len(data), offset, source.label, checksum(data)


def _append_member(file: BinaryIO, name: str, data: bytes) -> int:
    info = tarfile.TarInfo(name)  # time, owner and group stay 0: the same input gives the same bytes
    info.size = len(data)
    file.write(info.tobuf(tarfile.USTAR_FORMAT))
    offset = file.tell()
    file.write(data)
    file.write(bytes(-len(data) % 512))
    return offset
