"""What a folder holds of a copy of shards. Complete ones are known by their length, time of change and a note of their hash."""

import contextlib
import json
from pathlib import Path

from fastmae.errors import DataError
from fastmae.files import digest
from fastmae.shards.index import JSON_NAME, TABLE_NAME, Index, Shard

NOTES = ".staged"


def staged_folder(root: str | Path, index: Index) -> Path:
    """Where the copy of the shards of ``index`` lies under ``root``."""
    return Path(root) / index.fingerprint


def is_complete(folder: Path, index: Index) -> bool:
    """Whether ``folder`` is a finished copy whose shards are as they were noted."""
    if not (folder / JSON_NAME).is_file() or not (folder / TABLE_NAME).is_file():
        return False
    try:
        copy = Index.load(folder)
    except DataError:
        return False
    if (copy.fingerprint, copy.classes, copy.build) != (index.fingerprint, index.classes, index.build):
        return False
    noted = read_notes(folder / NOTES)
    return all(noted.get(shard.name) == note_of(folder / shard.name, shard) for shard in copy.shards)


def names_in_copy(index: Index) -> list[str]:
    """The shards' names in the copy: their own, unless some lie elsewhere than beside their index."""
    names = [shard.name for shard in index.shards]
    if all(name == Path(name).name and not name.startswith(".") for name in names) and len({*names}) == len(names):
        return names
    return [f"shard-{number:06d}.tar" for number in range(len(names))]


def lacking_bytes(index: Index, folder: Path) -> int:
    """Bytes that a copy still needs; 0 if no shard lacks. What is of the right length is taken for good."""
    lacking = [
        shard.bytes
        for name, shard in zip(names_in_copy(index), index.shards, strict=True)
        if size_of(folder / name) != shard.bytes
    ]
    return sum(lacking) + index.table.nbytes if lacking else 0


def is_there(path: Path, shard: Shard, note: list | None) -> bool:
    """Whether ``path`` is the whole shard: as it was noted, or by its hash. One that is not is removed."""
    if size_of(path) is None:
        return False
    if size_of(path) == shard.bytes:
        if note == note_of(path, shard):
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


def note_of(path: Path, shard: Shard) -> list:
    found = path.stat()
    return [path.name, found.st_size, found.st_mtime_ns, shard.xxh3]


def read_notes(path: Path) -> dict[str, list]:
    """The last note of each shard; lines that are none are passed over: their shards are hashed again."""
    noted = {}
    with contextlib.suppress(OSError):
        for line in path.read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError, TypeError, IndexError):
                note = json.loads(line)
                noted[note[0]] = note
    return noted
