"""The samples of a tar, grouped as webdataset groups them.

A member's key is its name up to the first dot of the last part, its extension the rest in lower case; consecutive members of
one key are a sample. Its image is the member with the first extension of ``IMAGES`` that it has, its label the number in
``cls``. What webdataset skips silently, damage or a duplicate key, is an error. Other members are never opened.
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

_MAX_BYTES = 2**32 - 1  # of an image, by the index's dtype
_MAX_CLASS = 2**31 - 1
_SIZE = slice(124, 136)  # its field in a tar header
_MAX_CLASS_TEXT = 32  # bytes of a ``cls`` member


class Sample(NamedTuple):
    """One image in a tar: its member's name, the offset of its bytes, their number, its class number or -1."""

    name: str
    offset: int
    size: int
    label: int


def list_samples(path: Path) -> tuple[list[Sample], int]:
    """The images of a tar in their order, and the number of samples without an image.

    Raises DataError naming path, offset and reason if the tar is damaged, a key is duplicate, a ``cls`` is not a number, or no
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
        raise DataError(f"{path}: no images; looked for members named {', '.join(f'.{e}' for e in IMAGES)}; move it elsewhere")
    return samples, without


def label_of(text: bytes) -> int | None:
    """The class number in a ``cls`` member, -1 for no class; None if it is not one."""
    is_number = len(text) <= _MAX_CLASS_TEXT and re.fullmatch(rb"\s*-?[0-9]+\s*", text)
    return int(text) if is_number and -1 <= int(text) <= _MAX_CLASS else None


def states_size(header: bytes | memoryview, size: int) -> bool:
    """Whether a tar header states ``size`` in octal, as ``ShardReader`` needs it."""
    text = bytes(header[_SIZE])
    if text == b"%011o\0" % size:  # as nearly every writer does; once per sample that is read
        return True
    text = text.rstrip(b" \0").lstrip(b" ")
    return text.isdigit() and b"8" not in text and b"9" not in text and int(text, 8) == size


def _groups(path: Path, listed: list[Member]) -> Iterator[dict[str, Member]]:
    """Each sample's members by their extension."""
    seen = set()
    named = ((_split(member.name), member) for member in listed)
    for key, group in groupby(((*name, member) for name, member in named if name), key=itemgetter(0)):
        members: dict[str, Member] = {}
        for _, extension, member in group:
            if key in seen:
                raise DataError(
                    f"{path}: duplicate key {key[:200]!r}: member {member.name[:200]!r} at offset {member.offset} follows "
                    "another sample; write the tar again, with the members of each sample consecutive"
                )
            if extension in members:
                raise DataError(
                    f"{path}: member {member.name[:200]!r} at offset {member.offset}: its sample already has a "
                    f".{extension[:200]}; write the tar again, with one of them"
                )
            members[extension] = member
        seen.add(key)
        yield members


def _split(name: str) -> tuple[str, str] | None:
    """Key and extension of a member; None for those that belong to no sample."""
    folder, slash, last = name.rpartition("/")
    stem, dot, extension = last.partition(".")
    is_meta = re.match(r"__[^/]*__($|/)", name)  # metadata of webdataset, which skips it too
    return (folder + slash + stem, extension.lower()) if stem and dot and not is_meta else None


def _check_image(path: Path, file: BinaryIO, image: Member) -> None:
    """An image must fit into the index, and the header right before it must state its size as ``ShardReader`` reads it."""
    where = f"{path}: image {image.name[:200]!r} at offset {image.offset}"
    if image.size > _MAX_BYTES:
        raise DataError(f"{where} has {image.size} bytes, the limit is {_MAX_BYTES}; write the tar again without it")
    file.seek(image.offset - BLOCK)
    header = file.read(BLOCK)
    if not states_size(header, image.size):
        raise DataError(
            f"{where}: the header before it states its size as {header[_SIZE]!r}, not as the octal number {image.size:o} that "
            "random access needs; write the tar again with another program"
        )


def _label(path: Path, file: BinaryIO, member: Member | None) -> int:
    if member is None:
        return -1
    file.seek(member.offset)
    text = file.read(min(member.size, _MAX_CLASS_TEXT + 1))
    label = label_of(text)
    if label is None:
        raise DataError(
            f"{path}: member {member.name[:200]!r} at offset {member.offset}: a class must be an integer from 0, or -1 for "
            f"none, got {text!r}; write the tar again"
        )
    return label
