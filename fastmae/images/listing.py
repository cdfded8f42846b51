"""The images of a folder: in the order of their paths, with their classes, and a hash that changes when one of them does."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import xxhash

from fastmae.errors import InputError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")


class Source(NamedTuple):
    """One image file; a tuple of plain values, because there may be millions."""

    root: str
    """The folder that was listed."""
    name: str
    """Path from there, with slashes."""
    number: int
    """Index in the list."""
    label: int
    """Class number, or -1."""
    bytes: int
    """Length of the file, or -1 if it is unknown."""

    @property
    def path(self) -> Path:
        """The file itself."""
        return Path(self.root, self.name)


class Listing(NamedTuple):
    """The images of a folder."""

    sources: list[Source]
    classes: list[str]
    """Names of the top-level folders that hold images, by class number."""
    xxh3: str
    """The xxh3-64 of every image's path, length and time of change, in hex."""


def list_images(root: Path) -> Listing:
    """The images under ``root`` in the order of their paths. Raises InputError if there is none, or a folder is unreadable."""
    if not root.is_dir():
        raise InputError(f"{root}: not a folder; give a folder of images, with a subfolder for each class if there are any")
    found = sorted(_walk(str(root)))
    if not found:
        raise InputError(f"{root}: no images; looked for {', '.join(EXTENSIONS)} in it and its subfolders")
    state = xxhash.xxh3_64()
    for name, size, time in found:
        state.update(b"%s\0%d\0%d\0" % (os.fsencode(name), size, time))
    folders = [name.partition("/")[0] if "/" in name else None for name, _, _ in found]
    classes = sorted({f for f in folders if f is not None})
    number_of = {name: i for i, name in enumerate(classes)}
    sources = [
        Source(str(root), name, number, number_of.get(folder, -1), size)
        for number, ((name, size, _), folder) in enumerate(zip(found, folders, strict=True))
    ]
    return Listing(sources, classes, state.hexdigest())


def _walk(root: str) -> Iterator[tuple[str, int, int]]:
    """(path from ``root``, bytes, time of change in ns) of each image; -1 for both of a broken link."""
    seen: set[str] = set()
    waiting = [""]
    while waiting:
        folder = waiting.pop()
        path = os.path.join(root, folder)  # noqa: PTH118 - a Path for each of millions costs more than the listing
        if (real := os.path.realpath(path)) in seen:  # a link back into a folder above
            continue
        seen.add(real)
        subfolders = []
        try:
            with os.scandir(path) as entries:
                for entry in entries:
                    if _is_folder(entry):
                        subfolders.append(f"{folder}{entry.name}/")
                    elif entry.name.lower().endswith(EXTENSIONS) and not entry.name.startswith("."):
                        yield f"{folder}{entry.name}", *_size_and_time(entry)
        except OSError as error:
            raise InputError(f"{error.filename or path}: cannot be read, {error.strerror}") from error
        waiting += sorted(subfolders, reverse=True)  # the first is next: of two paths to a folder always the same one


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _size_and_time(entry: os.DirEntry) -> tuple[int, int]:
    try:
        status = entry.stat()
    except OSError:  # kept in the list: reading it will fail with its name
        return -1, -1
    return status.st_size, status.st_mtime_ns
