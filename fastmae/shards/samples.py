"""The samples of a tar, found as webdataset would find them, in tars of ours and of others.

A member's key is its name up to the first dot of the last part, its extension the rest in lower case; neighbours of one key
are a sample. Its image is the member with the first extension of ``IMAGES`` that is there, its label the number in ``cls``.
What webdataset would pass over in silence, damage or a key that comes back, is an error. Other members are never opened.
"""

import re
from collections.abc import Iterator
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import BinaryIO, NamedTuple

from fastmae.errors import DataError
from fastmae.shards.tar import BLOCK, Member, list_members

IMAGES = ("jpg", "jpeg", "png", "webp", "ppm", "bmp", "gif")

_LARGEST = 2**32 - 1  # bytes of an image that a row of the index can state
_LARGEST_CLASS = 2**31 - 1
_SIZE = slice(124, 136)  # where a tar header states it
_CLASS_TEXT = 32  # bytes that a class number may take


class Sample(NamedTuple):
    """One image in a tar: its member's name, the offset of its bytes, their number, its class number or -1."""

    name: str
    offset: int
    size: int
    label: int


def list_samples(path: Path) -> tuple[list[Sample], int]:
    """The images of a tar in their order, and the number of its samples that have none.

    Raises DataError naming path, offset and reason if the tar is damaged, a key comes back, a ``cls`` is no number, or no
    sample has an image.
    """
    samples = []
    without = 0
    listed = list_members(path)
    with path.open("rb") as file:
        for members in _groups(path, listed):
            image = next((members[e] for e in IMAGES if e in members), None)
            if image is None or image.size == 0:
                without += 1
                continue
            _check_image(path, file, image)
            samples.append(Sample(*image, _label(path, file, members.get("cls"))))
    if not samples:
        raise DataError(f"{path}: no images; looked for members named {', '.join(f'.{e}' for e in IMAGES)}; leave it out")
    return samples, without


def label_of(text: bytes) -> int | None:
    """The class number that a ``cls`` member states, -1 for none; None if it is no such number."""
    is_number = len(text) <= _CLASS_TEXT and re.fullmatch(rb"\s*-?[0-9]+\s*", text)
    return int(text) if is_number and -1 <= int(text) <= _LARGEST_CLASS else None


def states_size(header: bytes, size: int) -> bool:
    """Whether a tar header states ``size`` in octal, as ``ShardReader`` needs it."""
    text = header[_SIZE].rstrip(b" \0")
    return re.fullmatch(rb" *[0-7]+", text) is not None and int(text, 8) == size


def _groups(path: Path, listed: list[Member]) -> Iterator[dict[str, Member]]:
    """Each sample's members by their extension."""
    seen = set()
    named = ((_split(member.name), member) for member in listed)
    for key, group in groupby(((*name, member) for name, member in named if name), key=itemgetter(0)):
        members: dict[str, Member] = {}
        for _, extension, member in group:
            if key in seen:
                raise DataError(
                    f"{path}: duplicate key {key[:200]!r}: member {member.name[:200]!r} at offset {member.offset} comes after "
                    "other samples; write the tar anew, with the members of a sample side by side"
                )
            if extension in members:
                raise DataError(
                    f"{path}: member {member.name[:200]!r} at offset {member.offset}: its sample has a .{extension[:200]} "
                    "already; write the tar anew, with one of them"
                )
            members[extension] = member
        seen.add(key)
        yield members


def _split(name: str) -> tuple[str, str] | None:
    """Key and extension of a member; None for those that belong to no sample."""
    folder, slash, last = name.rpartition("/")
    stem, dot, extension = last.partition(".")
    is_meta = re.match(r"__[^/]*__($|/)", name)  # webdataset's own; it skips them too
    return (folder + slash + stem, extension.lower()) if stem and dot and not is_meta else None


def _check_image(path: Path, file: BinaryIO, image: Member) -> None:
    """An image must fit into a row, and the header right before it must state its size as ``ShardReader`` reads it."""
    where = f"{path}: image {image.name[:200]!r} at offset {image.offset}"
    if image.size > _LARGEST:
        raise DataError(f"{where} has {image.size} bytes, the most are {_LARGEST}; leave it out")
    file.seek(image.offset - BLOCK)
    header = file.read(BLOCK)
    if not states_size(header, image.size):
        raise DataError(
            f"{where}: the header before it states its {image.size} bytes as {header[_SIZE]!r}, not as an octal number, which "
            "reading at random needs; write the tar anew with another program"
        )


def _label(path: Path, file: BinaryIO, member: Member | None) -> int:
    if member is None:
        return -1
    file.seek(member.offset)
    text = file.read(min(member.size, _CLASS_TEXT + 1))
    label = label_of(text)
    if label is None:
        raise DataError(
            f"{path}: member {member.name[:200]!r} at offset {member.offset}: a class is a whole number from 0 on, or -1 for "
            f"none, got {text!r}; write the tar anew"
        )
    return label
