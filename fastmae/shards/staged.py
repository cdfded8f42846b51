"""What a folder holds of a copy of shards: complete ones have the size, time of change and hash that its manifest records."""

import contextlib
import json
from pathlib import Path

from fastmae.errors import DataError
from fastmae.files import digest
from fastmae.shards.index import JSON_NAME, TABLE_NAME, Index, Shard

MANIFEST = ".staged"


def staged_folder(root: str | Path, index: Index) -> Path:
    """Where the copy of the shards of ``index`` lies under ``root``."""
    return Path(root) / index.fingerprint


def is_complete(folder: Path, index: Index) -> bool:
    """Whether ``folder`` is a finished copy whose shards have not changed since."""
    if not (folder / JSON_NAME).is_file() or not (folder / TABLE_NAME).is_file():
        return False
    try:
        copy = Index.load(folder)
    except DataError:
        return False
    if (copy.fingerprint, copy.classes, copy.build) != (index.fingerprint, index.classes, index.build):
        return False
    records = read_manifest(folder / MANIFEST)
    return all(records.get(shard.name) == record_of(folder / shard.name, shard) for shard in copy.shards)


def names_in_copy(index: Index) -> list[str]:
    """The shards' names in the copy: their own, unless some are in other folders than their index."""
    names = [shard.name for shard in index.shards]
    if all(name == Path(name).name and not name.startswith(".") for name in names) and len({*names}) == len(names):
        return names
    return [f"shard-{number:06d}.tar" for number in range(len(names))]


def lacking_bytes(index: Index, folder: Path) -> int:
    """Bytes that a copy still needs, 0 if all shards are there; those of the right size count as complete."""
    lacking = [
        shard.bytes
        for name, shard in zip(names_in_copy(index), index.shards, strict=True)
        if size_of(folder / name) != shard.bytes
    ]
    return sum(lacking) + index.table.nbytes if lacking else 0


def is_complete_shard(path: Path, shard: Shard, record: list | None) -> bool:
    """Whether ``path`` is all of the shard, by its ``record`` or its hash. One that is not is removed."""
    if size_of(path) is None:
        return False
    if size_of(path) == shard.bytes:
        if record == record_of(path, shard):
            return True
        with path.open("rb") as file:
            if digest(file) == shard.xxh3:
                return True
    path.unlink()
    return False


def size_of(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None


def record_of(path: Path, shard: Shard) -> list:
    """A shard's line of the manifest: name, bytes, time of change in ns, hash."""
    found = path.stat()
    return [path.name, found.st_size, found.st_mtime_ns, shard.xxh3]


def read_manifest(path: Path) -> dict[str, list]:
    """The last record of each shard by its name; damaged lines are skipped, and their shards hashed again."""
    records = {}
    with contextlib.suppress(OSError):
        for line in path.read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError, TypeError, IndexError):
                record = json.loads(line)
                records[record[0]] = record
    return records


class Manifest:
    """The manifest of a folder, appended to while it is copied. A full disk costs records, so that their shards are hashed by
    the next start. Raises OSError if it cannot be opened."""

    def __init__(self, folder: Path):
        self.records = read_manifest(folder / MANIFEST)
        self._file = (folder / MANIFEST).open("ab", buffering=0)
        self._write("\n")  # ends a line that a killed copy left incomplete

    def add(self, record: list) -> None:
        self._write(json.dumps(record) + "\n")

    def close(self) -> None:
        self._file.close()

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError):
            self._file.write(text.encode())
