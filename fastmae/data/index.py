"""The index beside a folder of shards: where every sample lies, so that any of them is one read away.

``index.json`` names the shards (bytes, samples, hash) and is written last, so its presence means a finished build;
``index.npy`` holds one row a sample: shard, size, offset of the image's bytes in the tar, label. Shards themselves are plain
webdataset tars, readable without the index.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from fastmae.errors import DataError
from fastmae.files import write_atomically

FORMAT = 1
JSON_NAME, TABLE_NAME = "index.json", "index.npy"
ROW = np.dtype([("shard", "<u4"), ("size", "<u4"), ("offset", "<u8"), ("label", "<i4")])
"""One sample: number of its shard, bytes of its image, their offset in the tar, class number or -1."""


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One tar: its file name, length in bytes, count of samples, and the xxh3-64 of its bytes in hex."""

    name: str
    bytes: int
    samples: int
    xxh3: str


@dataclass(frozen=True, kw_only=True)
class Index:
    """What ``index.json`` and ``index.npy`` of ``folder`` say."""

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
        """A hash of every shard's hash and of the sample table: equal means the same samples in the same places."""
        shards = [(s.name, s.bytes, s.samples, s.xxh3) for s in self.shards]
        return xxhash.xxh3_64_hexdigest(json.dumps(shards).encode() + self.table.tobytes())

    def save(self) -> None:
        """Write both files, the JSON last, each under a temporary name first."""
        with write_atomically(self.folder / TABLE_NAME) as file:
            np.save(file, self.table)
        document = {
            "format": FORMAT,
            "samples": len(self.table),
            "table_xxh3": xxhash.xxh3_64_hexdigest(self.table.tobytes()),
            "classes": list(self.classes),
            "build": self.build,
            "shards": [vars(s) for s in self.shards],
        }
        with write_atomically(self.folder / JSON_NAME) as file:
            file.write(json.dumps(document, indent=1).encode())

    @classmethod
    def load(cls, folder: str | Path) -> "Index":
        """Read the index of ``folder``; every shard must be there with its stated length.

        Raises DataError that names the file if anything is missing, damaged, or does not match.
        """
        folder = Path(folder)
        document = _read_json(folder / JSON_NAME)
        try:
            if document["format"] > FORMAT:
                raise DataError(f"{folder / JSON_NAME}: format {document['format']} is newer than {FORMAT}; update fastmae")
            shards = tuple(Shard(**s) for s in document["shards"])
            table = np.load(folder / TABLE_NAME, allow_pickle=False)
            is_intact = table.dtype == ROW and xxhash.xxh3_64_hexdigest(table.tobytes()) == document["table_xxh3"]
            index = cls(folder=folder, shards=shards, table=table, classes=tuple(document["classes"]), build=document["build"])
        except (KeyError, TypeError) as error:
            raise DataError(f"{folder / JSON_NAME}: damaged, {error!r}; build the shards again") from error
        except (OSError, ValueError, EOFError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{folder / TABLE_NAME}: cannot be read, {error}; build the shards again") from error
        if not is_intact:
            raise DataError(f"{folder / TABLE_NAME}: does not match {JSON_NAME}; build the shards again")
        index._check_shards()
        return index

    def _check_shards(self) -> None:
        if not len(self.table):
            raise DataError(f"{self.folder}: the index lists no samples; build the shards again from images that open")
        for number, shard in enumerate(self.shards):
            path = self.folder / shard.name
            if not path.is_file():
                raise DataError(f"{path}: missing; the index lists {len(self.shards)} shards, this is number {number}")
            size = path.stat().st_size
            if size != shard.bytes:
                raise DataError(f"{path}: {size} bytes, the index says {shard.bytes}; restore it or build the shards again")


def _read_json(path: Path) -> dict:
    try:
        document = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: cannot be read, {error.strerror}") from error
    except ValueError as error:
        raise DataError(f"{path}: damaged, not JSON ({error}); build the shards again") from error
    if not isinstance(document, dict):
        raise DataError(f"{path}: damaged, not a JSON object; build the shards again")
    return document
