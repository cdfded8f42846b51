"""The index beside a folder of shards: where every sample lies, so that any of them is one read away.

``index.json`` names the shards (bytes, samples, hash) and is written last, so its presence means a finished build;
``index.npy`` holds one row a sample: shard, size, offset of the image's bytes in the tar, label, checksum. Shards themselves
are plain webdataset tars, readable without the index.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from fastmae.errors import DataError
from fastmae.files import digest, write_atomically

FORMAT = 2
JSON_NAME, TABLE_NAME = "index.json", "index.npy"
ROW = np.dtype([("shard", "<u4"), ("size", "<u4"), ("offset", "<u8"), ("label", "<i4"), ("check", "<u4")])
"""One sample: number of its shard, bytes of its image, their offset in the tar, class number or -1, ``checksum`` of them."""


def checksum(data: bytes) -> int:
    """The low 32 bits of the xxh3-64 of an image's bytes: what a read compares, so that no flipped bit is ever trained on."""
    return xxhash.xxh3_64_intdigest(data) & 0xFFFFFFFF


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One tar: its path from the index's folder, length in bytes, count of samples, and the xxh3-64 of its bytes in hex."""

    name: str
    bytes: int
    samples: int
    xxh3: str

    def __post_init__(self):
        if [type(v) for v in vars(self).values()] != [str, int, int, str] or not 0 <= self.samples <= self.bytes < 2**62:
            raise TypeError(f"not a shard: {vars(self)}")
        if not self.name or b"\0" in os.fsencode(self.name):
            raise ValueError(f"not a file's name: {self.name!r}")


@dataclass(frozen=True, kw_only=True)
class Index:
    """What ``index.json`` and ``index.npy`` of ``folder`` hold."""

    folder: Path
    shards: tuple[Shard, ...]
    table: np.ndarray
    """(n,) of ``ROW``."""
    classes: tuple[str, ...]
    """Class names in the order of their numbers; empty without labels."""
    build: dict
    """The settings the shards were built with."""

    def __len__(self) -> int:
        return len(self.table)

    @property
    def fingerprint(self) -> str:
        """A hash of every shard's hash and of the sample table: equal means the same samples under the same numbers."""
        shards = [(s.bytes, s.samples, s.xxh3) for s in self.shards]
        return xxhash.xxh3_64_hexdigest(json.dumps(shards).encode() + self.table.tobytes())

    def save(self) -> None:
        """Write both files, the JSON last, each under a temporary name first."""
        with write_atomically(self.folder / TABLE_NAME) as file:
            np.save(file, self.table)
            table_xxh3 = digest(file)
        document = {
            "format": FORMAT,
            "samples": len(self.table),
            "table_xxh3": table_xxh3,
            "classes": list(self.classes),
            "build": self.build,
            "shards": [vars(s) for s in self.shards],
        }
        document["xxh3"] = _own_digest(document)
        with write_atomically(self.folder / JSON_NAME) as file:
            file.write(json.dumps(document, indent=1).encode())

    @classmethod
    def load(cls, folder: str | Path, *, check_shards: bool = True) -> "Index":
        """Read the index of ``folder``; every shard must be there with its stated length, unless ``check_shards`` is off.

        Raises DataError that names the file if anything is missing, damaged, or does not match.
        """
        folder = Path(folder)
        document = _read_document(folder / JSON_NAME)
        try:
            shards = tuple(Shard(**s) for s in document["shards"])
            samples, table_xxh3, classes, build = (document[n] for n in ("samples", "table_xxh3", "classes", "build"))
            if not isinstance(classes, list) or not all(isinstance(c, str) for c in classes) or not isinstance(build, dict):
                raise TypeError("classes are a list of names, build is an object")
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{folder / JSON_NAME}: damaged, {error!r}; {_MEND}") from error
        table, found_xxh3 = _read_table(folder / TABLE_NAME)
        if table.dtype != ROW or table.size != samples or found_xxh3 != table_xxh3:
            raise DataError(f"{folder / TABLE_NAME}: does not match {JSON_NAME}; {_MEND}")
        index = cls(folder=folder, shards=shards, table=table, classes=tuple(classes), build=build)
        index._check_table()
        if check_shards:
            index._check_shards()
        return index

    def _check_table(self) -> None:
        """The rows must lie inside the shards they name, and be as many as stated."""
        path = self.folder / TABLE_NAME
        if self.table.ndim != 1 or not len(self.table):
            raise DataError(f"{self.folder}: the index lists no samples; build the shards again from images that open")
        shard, offset, size = (self.table[name].astype(np.int64) for name in ("shard", "offset", "size"))
        if shard.max() >= len(self.shards):
            raise DataError(f"{path}: names shard {shard.max()} of {len(self.shards)}; {_MEND}")
        stated = [s.samples for s in self.shards]
        if np.bincount(shard, minlength=len(stated)).tolist() != stated:
            raise DataError(f"{path}: its samples per shard are not those of {JSON_NAME}; {_MEND}")
        ends = np.array([s.bytes for s in self.shards])[shard]
        wrong = np.flatnonzero((offset < 512) | (size == 0) | (offset > ends - size))
        if len(wrong):
            at = int(wrong[0])
            raise DataError(
                f"{self.folder / self.shards[shard[at]].name}: the index lists {size[at]} bytes at offset {offset[at]} of a "
                f"shard of {ends[at]}; {_MEND}"
            )

    def _check_shards(self) -> None:
        """Every shard must be there once, with its stated length."""
        of_hash: dict[str, str] = {}
        for number, shard in enumerate(self.shards):
            path = self.folder / shard.name
            try:
                size = path.stat().st_size if path.is_file() else None
            except OSError as error:
                raise DataError(f"{path}: cannot be read, {error.strerror}") from error
            if size is None:
                raise DataError(self._missing(number))
            if size != shard.bytes:
                raise DataError(
                    f"{path}: {size} bytes, the index says {shard.bytes}: truncated at offset {size}, or another file; "
                    f"restore it, or {self._remake}"
                )
            if shard.xxh3 in of_hash:
                raise DataError(
                    f"{path}: the same shard as {of_hash[shard.xxh3]}, its samples would come twice; remove one of them"
                )
            of_hash[shard.xxh3] = shard.name

    @property
    def _remake(self) -> str:
        return "index the tars again" if self.build.get("indexed") else "build the shards again"

    def _missing(self, number: int) -> str:
        """What to do about the tar of shard ``number``, which is not there: alone, or as all others, which are elsewhere."""
        path = self.folder / self.shards[number].name
        lacks = f"{path}: missing; the index lists {len(self.shards)} shards, this is number {number}"
        if any((self.folder / shard.name).exists() for shard in self.shards):
            return f"{lacks}; restore it, or {self._remake}"
        where = f"{lacks}, and none of them is there: {self.folder / JSON_NAME} looks for its tars in {path.parent.resolve()}"
        if self.build.get("indexed"):
            classes = " --classes FILE" if self.classes else ""
            return f"{where}; if they were moved to TARS, `fastmae shards index TARS --out {self.folder}{classes}` finds them"
        return f"{where}; move {JSON_NAME} and {TABLE_NAME} to where the tars are, and give that folder"


_MEND = "build the shards again, or index them again with `fastmae shards index`"


def _own_digest(document: dict) -> str:
    """The xxh3-64 of the document without its own digest, so that no changed character goes unnoticed."""
    rest = {name: value for name, value in document.items() if name != "xxh3"}
    return xxhash.xxh3_64_hexdigest(json.dumps(rest, sort_keys=True).encode())


def _read_table(path: Path) -> tuple[np.ndarray, str]:
    """The table, and the xxh3-64 of the file's bytes."""
    try:
        with path.open("rb") as file:
            xxh3 = digest(file)
        # Mapped, so that numpy compares the shape in the header with the length of the file before it takes memory.
        return np.array(np.load(path, mmap_mode="r", allow_pickle=False)), xxh3
    except Exception as error:  # numpy reads the header as Python's source, and raises anything on a damaged one
        raise DataError(f"{path}: cannot be read, {error}; {_MEND}") from error


def _read_document(path: Path) -> dict:
    try:
        document = json.loads(path.read_bytes())
        digest = _own_digest(document) if isinstance(document, dict) else None
    except FileNotFoundError as error:
        raise DataError(f"{path}: cannot be read, No such file; `fastmae shards index` makes an index for tars") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read, {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: damaged, not JSON ({error}); {_MEND}") from error
    if not isinstance(document, dict):
        raise DataError(f"{path}: damaged, not a JSON object; {_MEND}")
    if (stated := document.get("format")) != FORMAT:
        if isinstance(stated, int) and stated > FORMAT:
            raise DataError(f"{path}: format {stated} is newer than {FORMAT}; update fastmae")
        raise DataError(f"{path}: format {stated!r}, this version reads {FORMAT}; {_MEND}")
    if document.get("xxh3") != digest:
        raise DataError(f"{path}: damaged, its contents do not match their own hash; {_MEND}")
    return document
