"""Find every damage in a folder of indexed shards, and state where it is.

Each shard's hash covers all its bytes, the index's own hashes cover the index. Beyond the hashes each tar is listed strictly
and compared with its rows, each image with its checksum; so an index that lies is found too, even if all its hashes are right.
"""

import json
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np

from fastmae.errors import DataError
from fastmae.files import digest
from fastmae.images.decode import DecodeError, decode
from fastmae.map_ordered import map_ordered
from fastmae.shards.index import JSON_NAME, Index, checksum
from fastmae.shards.journal import UNFINISHED
from fastmae.shards.samples import Sample, list_samples, states_size
from fastmae.shards.tar import BLOCK

_INDEX_AGAIN = "index the shards again"


def verify_shards(
    folder: str | Path,
    *,
    decode_images: bool = False,
    workers: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """A line for each damage in ``folder``, naming path, offset and member; none if every byte is as it was indexed.

    ``decode_images`` also decodes every image, and names those that fail. ``workers`` processes read, 0 does it here.
    ``progress(done, total)`` is called after each shard. A damaged index is a line like any other; WorkerError is raised only
    if workers die again and again.
    """
    try:
        index = Index.load(folder, check_shards=False)
    except DataError as error:
        return [str(error)]
    lines = [*_check_spelling(index), *_check_folder(index)]
    order = np.argsort(index.table["shard"], kind="stable")
    bounds = np.cumsum([0, *(shard.samples for shard in index.shards)])
    parts = (
        _part(index, number, index.table[order[bounds[number] : bounds[number + 1]]]) for number in range(len(index.shards))
    )
    verify = partial(_verify_shard, decode_images=decode_images)
    found = map_ordered(verify, parts, workers, name=lambda part: str(part.folder / part.shards[0].name))
    for done, damages in enumerate(found, 1):
        lines += damages
        if progress:
            progress(done, len(index.shards))
    return lines


def _part(index: Index, number: int, table: np.ndarray) -> Index:
    """The index of one shard alone, whose rows are ``table``."""
    table["shard"] = 0
    return Index(folder=index.folder, shards=(index.shards[number],), table=table, classes=index.classes, build=index.build)


def _check_spelling(index: Index) -> Iterator[str]:
    """The JSON must be what was written to the byte: its own hash does not cover its spaces."""
    path = index.folder / JSON_NAME
    text = path.read_bytes()
    if text != json.dumps(json.loads(text), indent=1).encode():
        yield f"{path}: its content is intact, but its white space is not as it was written; restore it"


def _check_folder(index: Index) -> Iterator[str]:
    """Shards listed twice, and tars beside them that are not listed."""
    if (index.folder / UNFINISHED).exists():
        yield f"{index.folder}: the build of these shards was not finished; the same `fastmae shards build` continues it"
    paths = [index.folder / shard.name for shard in index.shards]
    first: dict[str, Path] = {}
    for path, shard in zip(paths, index.shards, strict=True):
        if shard.xxh3 in first:
            yield f"{path}: listed as the same bytes as {first[shard.xxh3]}, its samples come twice; remove one of them"
        first.setdefault(shard.xxh3, path)
    listed = {os.path.realpath(path) for path in paths}
    for parent in sorted({index.folder, *(path.parent for path in paths)}):
        for path in sorted(parent.glob("*.tar")):
            if os.path.realpath(path) not in listed and not path.name.startswith("."):
                yield f"{path}: not in the index, its samples are not used; remove it, or index the shards again"


def _verify_shard(part: Index, decode_images: bool) -> list[str]:
    """What is wrong with the one shard of ``part``."""
    (shard,) = part.shards
    path = part.folder / shard.name
    lines = []
    try:
        if not path.is_file():
            return [f"{path}: missing; restore it, or index the shards again"]
        with path.open("rb") as file:
            xxh3, size = digest(file), file.tell()
    except OSError as error:
        return [f"{path}: cannot be read, {error.strerror}; restore it"]
    if size != shard.bytes:
        lost = sum(row["offset"] + row["size"] > size for row in _rows(part))
        lines.append(
            f"{path}: {size} bytes, the index says {shard.bytes}, and {lost} of {shard.samples} images lie past its end: "
            f"truncated at offset {size}, or another file; restore it"
        )
    try:
        listed = list_samples(path)[0]
    except DataError as error:
        lines.append(str(error))
        listed = None
    lines += [] if listed is None else _compare(path, part, listed)
    lines += _read_images(path, part, listed, size, decode_images)
    if xxh3 != shard.xxh3 and not lines:
        lines.append(
            f"{path}: its bytes are not those that were indexed (hash), though all images are intact: headers, padding or "
            "other members were changed; restore it"
        )
    return lines


def _compare(path: Path, part: Index, listed: list[Sample]) -> Iterator[str]:
    """Rows that are not what the tar holds, and images without a row."""
    images = {(s.offset, s.size): s for s in listed}
    seen = set()
    for row in _rows(part):
        span = row["offset"], row["size"]
        if span not in images:
            yield f"{path}: the index lists {span[1]} bytes at offset {span[0]}, the tar has no such image; {_INDEX_AGAIN}"
            continue
        where = f"{path}: {images[span].name[:200]!r} at offset {span[0]}"
        if span in seen:
            yield f"{where}: is in the index twice; {_INDEX_AGAIN}"
        if row["label"] != images[span].label:
            yield f"{where}: class {images[span].label} in the tar, {row['label']} in the index; restore it, or {_INDEX_AGAIN}"
        seen.add(span)
    for span in sorted(images.keys() - seen):
        yield f"{path}: {images[span].name[:200]!r} at offset {span[0]} is not in the index; {_INDEX_AGAIN}"


def _read_images(path: Path, part: Index, listed: list[Sample] | None, size: int, decode_images: bool) -> Iterator[str]:
    """Rows whose image is not what was indexed; those that ``_compare`` or the length of the shard show already are not."""
    names = None if listed is None else {(s.offset, s.size): s.name for s in listed}
    with path.open("rb") as file:
        for row in _rows(part):
            span = row["offset"], row["size"]
            if (names is not None and span not in names) or sum(span) > size:
                continue
            file.seek(row["offset"] - BLOCK)
            header, data = file.read(BLOCK), file.read(row["size"])
            name = names[span] if names else header[:100].rstrip(b"\0").decode(errors="surrogateescape")
            where = f"{path}: {name[:200]!r} at offset {row['offset']}"
            if not states_size(header, row["size"]):
                yield f"{where}: the header before it does not state its {row['size']} bytes; restore the shard"
            if checksum(data) != row["check"]:
                yield f"{where}: its {row['size']} bytes are not those that were indexed (checksum); restore the shard"
            elif decode_images:
                try:
                    decode(data)
                except DecodeError as error:
                    yield f"{where}: {error}; remove it"


def _rows(part: Index) -> Iterator[dict]:
    for row in part.table:
        yield dict(zip(part.table.dtype.names, row.item(), strict=True))
