"""Shards by folder, path pattern or URL: found, and opened; http, s3 and gs through fsspec, ``pipe:`` only if allowed."""

import contextlib
import gzip
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from fastmae.errors import DataError, InputError
from fastmae.optional import require
from fastmae.shards.journal import UNFINISHED
from fastmae.shards.tar import COMPRESSED

_EXTRAS = {"http": "http", "https": "http", "s3": "s3", "gs": "gs"}  # scheme -> the extra of fsspec for it
_PIPE = "pipe:"
_END = 1024  # zero bytes of the end marker of a tar


def find_shards(data: str | Path, world_size: int, *, allow_pipe: bool = False) -> list[str]:
    """The shards that ``data`` names: a folder of tars, or paths or URLs with {000..999} expanded.

    Raises InputError if there are none, fewer than ranks, or if they cannot be read, and on ``pipe:`` unless it is allowed.
    """
    text = str(data)
    shards = _of_folder(Path(text)) if Path(text).is_dir() else _of_pattern(text, allow_pipe)
    if len(shards) < world_size:
        raise InputError(
            f"{text}: {len(shards)} shards for {world_size} ranks, each needs one; write smaller shards, or index them"
        )
    return shards


def open_shards(urls: list[str], opened: list[str]) -> Iterator[dict]:
    """webdataset's first stage: ``{"url", "stream"}`` of each, decompressed; those opened are appended to ``opened``.

    webdataset stops silently at a damaged header, and takes a tar that is truncated between two members for a complete one. So
    what it left unread is checked here: DataError unless that is the end marker, zeros alone.
    """
    for url in urls:
        with contextlib.ExitStack() as stack:
            opened.append(url)
            file = _Peeked(stack.enter_context(_open(url)))
            if file.head.startswith(b"\x1f\x8b"):
                file = stack.enter_context(gzip.GzipFile(fileobj=file))
            elif file.head.startswith(COMPRESSED):
                raise DataError(f"{url}: compressed, and only gzip can be read; decompress it")
            watched = _Watched(file)
            yield {"url": url, "stream": watched}
            watched.check_rest(url)


def _of_folder(folder: Path) -> list[str]:
    if (folder / UNFINISHED).exists():
        raise InputError(f"{folder}: the build of these shards was not finished; the same `fastmae shards build` resumes it")
    shards = sorted(str(p) for p in folder.iterdir() if p.name.endswith((".tar", ".tar.gz", ".tgz")) and p.name[0] != ".")
    if not shards:
        raise InputError(f"{folder}: no shards; give a folder with index.json or tars, as `fastmae shards build` writes")
    return shards


def _of_pattern(text: str, allow_pipe: bool) -> list[str]:
    try:
        shards = list(require("braceexpand", "a pattern of shards").braceexpand(text))
    except ValueError as error:
        raise InputError(f"{text}: braces do not match ({error}); give a pattern like a-{{000..099}}.tar") from error
    for shard in shards:
        scheme, colon, _ = shard.partition(":")
        if shard.startswith(_PIPE):
            if not allow_pipe:
                raise InputError(f"{shard}: pipe: runs shell commands and is refused; --allow-pipe allows it")
        elif not colon or scheme == "file" or "/" in scheme or Path(shard).exists():
            if not _local(shard).is_file():
                raise InputError(
                    f"{shard}: no such shard or folder; give a folder of shards, or a pattern like a-{{000..099}}.tar"
                )
        elif scheme not in _EXTRAS:
            raise InputError(f"{shard}: a URL must be of {', '.join(_EXTRAS)} or file, got {scheme!r}")
        else:
            _check_scheme(shard, scheme)
    return shards


def _check_scheme(url: str, scheme: str) -> None:
    try:
        require("fsspec", "reading URLs").get_filesystem_class(scheme)
    except (ImportError, ValueError) as error:
        raise InputError(f"{url}: cannot be read ({error}): pip install 'fsspec[{_EXTRAS[scheme]}]'") from error


def _local(url: str) -> Path:
    return Path(url.removeprefix("file://localhost").removeprefix("file://").removeprefix("file:"))


def _open(url: str) -> BinaryIO:
    if url.startswith(_PIPE):
        return require("webdataset.gopen", "a pipe", "webdataset").gopen(url)
    scheme, colon, _ = url.partition(":")
    if not colon or scheme not in _EXTRAS:
        return _local(url).open("rb")
    return require("fsspec", "reading URLs").open(url, "rb").open()


class _Peeked:
    """A file whose first bytes have been read ahead."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self.head = self._rest = file.read(6)

    def read(self, size: int = -1) -> bytes:
        if not self._rest:
            return self._file.read(size)
        data, self._rest = (self._rest, b"") if size < 0 else (self._rest[:size], self._rest[size:])
        return data + self._file.read(size - len(data) if size >= 0 else -1)


class _Watched:
    """A file that knows how far it was read, and its last bytes."""

    def __init__(self, file: BinaryIO):
        self._file, self._position, self._last = file, 0, b""

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self._position += len(data)
        self._last = (self._last + data)[-_END:]
        return data

    def check_rest(self, url: str) -> None:
        """Raise DataError if more than zeros follow, or the end marker is missing."""
        stopped = self._position
        while block := self.read(1 << 20):
            if block.strip(b"\0"):
                raise DataError(
                    f"{url}: damaged before offset {stopped}, where reading stopped although data follow; restore the shard"
                )
        if self._last.strip(b"\0") or len(self._last) < _END:
            raise DataError(
                f"{url}: truncated at offset {self._position}: the end marker of a tar is missing; restore the shard"
            )
