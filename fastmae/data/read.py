"""Read one sample's bytes: one positioned read, checked against the tar's own header."""

import os
import resource
from collections import OrderedDict

from fastmae.data.index import Index
from fastmae.errors import DataError

_BLOCK = 512  # bytes of a tar header


class ShardReader:
    """Random access to the images of an index. Safe to carry into a worker process: each opens its own files."""

    def __init__(self, index: Index):
        self.index = index
        self._files: OrderedDict[int, int] = OrderedDict()
        self._most = max(8, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4)

    def __getstate__(self):
        return {**self.__dict__, "_files": OrderedDict()}

    def read(self, sample: int) -> bytes:
        """The image bytes of ``sample``. Raises DataError naming path and offset if they are not where the index says."""
        row = self.index.table[sample]
        size, offset = int(row["size"]), int(row["offset"])
        data = os.pread(self._file(int(row["shard"])), _BLOCK + size, offset - _BLOCK)
        header = data[:_BLOCK]
        try:
            stated = int(header[124:136].rstrip(b" \0"), 8)
        except ValueError:
            stated = -1
        if len(data) != _BLOCK + size or header[257:262] != b"ustar" or stated != size:
            raise DataError(
                f"{self.path(sample)}: the index does not match the tar at offset {offset}: it lists an image of {size} "
                "bytes there; build the index or the shards again"
            )
        return data[_BLOCK:]

    def name(self, sample: int) -> str:
        """Shard and key of ``sample``, for messages."""
        row = self.index.table[sample]
        header = os.pread(self._file(int(row["shard"])), 100, int(row["offset"]) - _BLOCK)
        return f"{self.path(sample)}: {header.rstrip(bytes(1)).decode(errors='replace')}"

    def path(self, sample: int) -> str:
        """Path of the shard that holds ``sample``."""
        return str(self.index.folder / self.index.shards[int(self.index.table[sample]["shard"])].name)

    def _file(self, shard: int) -> int:
        """A file handle of ``shard``; the ones used longest ago are closed."""
        if shard not in self._files:
            path = self.index.folder / self.index.shards[shard].name
            try:
                self._files[shard] = os.open(path, os.O_RDONLY)
            except OSError as error:
                raise DataError(f"{path}: cannot be read, {error.strerror}") from error
            if len(self._files) > self._most:
                os.close(self._files.popitem(last=False)[1])
        self._files.move_to_end(shard)
        return self._files[shard]
