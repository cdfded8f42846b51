"""Where samples come from, opened before anything is made of them: indexed shards, or a stream of tars."""

import os
from pathlib import Path

import xxhash

from fastmae.shards.index import JSON_NAME, Index
from fastmae.shards.urls import find_shards


class Source:
    """The data that a text names.

    ``samples`` is the number of samples per epoch, None for a stream; ``fingerprint`` names the data; ``index`` is None for a
    stream, and ``shards``, its paths or URLs, empty for indexed shards.
    """

    def __init__(self, data: str | Path, *, world_size: int = 1, allow_pipe: bool = False):
        """Open ``data``: a folder with an index, a folder of tars, or a pattern of paths or URLs with {000..999} in it.

        ``world_size``: ranks that share a stream's shards. ``allow_pipe``: whether ``pipe:`` URLs, which run shell commands,
        are streamed. Raises InputError or DataError naming what is wrong.
        """
        self.data = data
        self.index = Index.load(data) if (Path(data) / JSON_NAME).is_file() else None
        self.shards: list[str] = []
        if self.index is not None:
            self.samples, self.fingerprint = len(self.index), self.index.fingerprint
            return
        self.shards = find_shards(data, world_size, allow_pipe=allow_pipe)
        urls = os.fsencode("\n".join(self.shards))
        self.samples, self.fingerprint = None, f"{self.kind} {xxhash.xxh3_64_hexdigest(urls)}"

    @property
    def kind(self) -> str:
        """What it is, for people."""
        return f"stream of {len(self.shards)} shards" if self.index is None else f"{len(self.index.shards)} indexed shards"
