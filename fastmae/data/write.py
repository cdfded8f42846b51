"""Build shards: a folder of images becomes webdataset tars and an index.

Images are listed in the order of their paths, shuffled once by the seed, cut into shards of a fixed number, recoded in
worker processes and written in that order: the same input gives the same bytes, whatever the number of workers. A shard
appears under its name only when it is complete, and the index only when all are.
"""

import os
import re
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np

from fastmae.data.index import JSON_NAME, ROW, Index, Shard
from fastmae.data.recode import Recode, recode
from fastmae.errors import InputError
from fastmae.files import digest, make_folder, write_atomically
from fastmae.kernels.philox import SHARDS, permutation

UNFINISHED = ".unfinished"  # stands in a folder of shards for as long as it is being built
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")


@dataclass(frozen=True)
class Source:
    """One image file: its path, its number in the sorted list, its class number or -1."""

    path: Path
    number: int
    label: int


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
    here. ``progress(done, total)`` is called after each image. Raises InputError if there is no image that opens, or if
    ``out`` holds shards already.
    """
    if samples_per_shard < 1:
        raise InputError(f"samples per shard must be at least 1, got {samples_per_shard}")
    root = Path(source)
    sources, classes = list_images(root)
    out = make_folder(out)
    if (out / JSON_NAME).exists() or any(out.glob("*.tar")):
        raise InputError(f"{out}: holds shards already; choose an empty folder, or remove it first")

    (out / UNFINISHED).touch()
    order = permutation(seed, SHARDS, 0, len(sources)).tolist()
    chunks = [order[i : i + samples_per_shard] for i in range(0, len(order), samples_per_shard)]
    shards, tables, bad = [], [], []
    done = 0
    encoded = _recode_all([[sources[i] for i in chunk] for chunk in chunks], settings, workers)
    for number, images in enumerate(encoded):
        name = f"shard-{number:06d}.tar"
        rows = []
        with write_atomically(out / name) as file:
            for item, data in images:
                done += 1
                if isinstance(data, str):
                    bad.append(f"{item.path}: {data}")
                else:
                    rows.append(_append(file, item, data, root, len(shards)))
                if progress:
                    progress(done, len(sources))
            file.write(bytes(1024))  # two zero blocks end a tar
            size = file.tell()
            xxh3 = digest(file)
        if not rows:  # every image of it was bad: an empty tar would only trouble readers
            (out / name).unlink()
            continue
        shards.append(Shard(name=name, bytes=size, samples=len(rows), xxh3=xxh3))
        tables.append(np.array(rows, dtype=ROW))
    if not shards:
        raise InputError(f"{root}: none of its {len(sources)} images can be read; the first: {bad[0]}")
    build = {**asdict(settings), "samples_per_shard": samples_per_shard, "seed": seed, "bad": len(bad)}
    index = Index(folder=out, shards=tuple(shards), table=np.concatenate(tables), classes=tuple(classes), build=build)
    index.save()
    (out / UNFINISHED).unlink()
    return index, bad


def list_images(root: Path) -> tuple[list[Source], list[str]]:
    """The images under ``root`` in the order of their paths, and the class names. Raises InputError if there is none."""
    if not root.is_dir():
        raise InputError(f"{root}: not a folder; give a folder of images, with a subfolder for each class if there are any")
    found = []
    seen: set[str] = set()

    def refuse(error: OSError) -> None:
        raise InputError(f"{error.filename}: cannot be read, {error.strerror}")

    for folder, subfolders, files in os.walk(root, followlinks=True, onerror=refuse):
        if (real := os.path.realpath(folder)) in seen:  # a link back into a folder above
            subfolders.clear()
            continue
        seen.add(real)
        subfolders.sort()
        found += [Path(folder, f) for f in files if f.lower().endswith(EXTENSIONS) and not f.startswith(".")]
    if not found:
        raise InputError(f"{root}: no images; looked for {', '.join(EXTENSIONS)} in it and its subfolders")
    found.sort(key=lambda path: path.relative_to(root).as_posix())
    folders = [path.relative_to(root).parts[0] if path.parent != root else None for path in found]
    classes = sorted({f for f in folders if f is not None})
    number_of = {name: i for i, name in enumerate(classes)}
    return [Source(path, i, number_of.get(f, -1)) for i, (path, f) in enumerate(zip(found, folders, strict=True))], classes


def _recode_all(chunks: list[list[Source]], settings: Recode, workers: int) -> Iterator[Iterator[tuple[Source, bytes | str]]]:
    """For each chunk, its sources with their JPEG bytes, or with the reason why there are none."""
    work = partial(_recode_one, settings=settings)
    if workers == 0:
        yield from (map(work, chunk) for chunk in chunks)
        return
    with ProcessPoolExecutor(workers) as pool:
        # One chunk ahead: workers go on while this process writes, and what waits in memory stays bounded.
        ahead = pool.map(work, chunks[0], chunksize=8)
        for chunk in chunks[1:]:
            current, ahead = ahead, pool.map(work, chunk, chunksize=8)
            yield current
        yield ahead


def _recode_one(source: Source, settings: Recode) -> tuple[Source, bytes | str]:
    try:
        return source, recode(source.path, settings)
    except Exception as error:  # a decoder may raise anything on damaged bytes; the image is named and counted
        return source, f"{type(error).__name__}: {error}"


def _append(file: BinaryIO, source: Source, data: bytes, root: Path, shard: int) -> tuple[int, int, int, int]:
    """Write one sample's members; return its row of the index."""
    relative = source.path.relative_to(root).with_suffix("").as_posix()
    # A key without dots, which webdataset cuts at, and short enough for a plain tar header; the number makes it unique.
    key = f"{source.number:08d}_{re.sub('[^A-Za-z0-9_-]', '_', relative)[-80:]}"
    if source.label >= 0:
        _append_member(file, f"{key}.cls", str(source.label).encode())
    offset = _append_member(file, f"{key}.jpg", data)
    return shard, len(data), offset, source.label


def _append_member(file: BinaryIO, name: str, data: bytes) -> int:
    info = tarfile.TarInfo(name)  # time, owner and group stay 0: the same input gives the same bytes
    info.size = len(data)
    file.write(info.tobuf(tarfile.USTAR_FORMAT))
    offset = file.tell()
    file.write(data)
    file.write(bytes(-len(data) % 512))
    return offset
