"""Read one sample's bytes: one positioned read, checked against the tar's own header."""

import os
import resource
import weakref
from collections import OrderedDict

from fastmae.errors import DataError, SampleError
from fastmae.shards.index import Index, checksum
from fastmae.shards.samples import states_size
from fastmae.shards.tar import BLOCK


class ShardReader:
    """Random access to the images of an index. May be sent to worker processes: each opens its own files."""

    def __init__(self, index: Index):
        self.index = index
        self._files: OrderedDict[int, int] = OrderedDict()
        weakref.finalize(self, _close, self._files)
        self._memory = bytearray()
        self._max_files = max(8, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4)

    def __getstate__(self):
        return {**self.__dict__, "_files": OrderedDict(), "_memory": bytearray()}

    def read(self, sample: int) -> bytes:
        """The image bytes of ``sample``. Raises as ``view``."""
        return bytes(self.view(sample))

    def view(self, sample: int) -> memoryview:
        """The image bytes of ``sample``, in memory that the next read overwrites.

        Raises DataError naming path and offset if the tar has no such image there, SampleError if the image's bytes do not
        match their checksum.
        """
        shard, size, offset, _, check = self.index.table[sample].item()
        if len(self._memory) < BLOCK + size:  # reused, because fresh memory costs a page fault each 4 KiB
            self._memory = bytearray(BLOCK + size)
        data = memoryview(self._memory)[: BLOCK + size]
        try:
            found = os.preadv(self._file(shard), [data], offset - BLOCK)
        except OSError as error:
            raise DataError(f"{self.location(sample)}: cannot be read, {error.strerror}") from error
        if found != BLOCK + size or not states_size(data, size):
            raise DataError(
                f"{self.path(sample)}: the index does not match the tar at offset {offset}, where it lists an image of {size} "
                "bytes; restore the shard, build it again, or index it again"
            )
        image = data[BLOCK:]
        if checksum(image) != check:
            raise SampleError(f"its {size} bytes at offset {offset} do not match their checksum in the index")
        return image

    def name(self, sample: int) -> str:
        """Shard and key of ``sample``, for messages; shard and offset if the shard cannot be read."""
        shard, _, offset, _, _ = self.index.table[sample].item()
        try:
            header = os.pread(self._file(shard), 100, offset - BLOCK)
        except (OSError, DataError):
            return self.location(sample)
        return f"{self.path(sample)}: {header.rstrip(bytes(1)).decode(errors='surrogateescape')}"

    def location(self, sample: int) -> str:
        """Shard and offset of ``sample``, for messages, without reading anything."""
        return f"{self.path(sample)}: offset {int(self.index.table[sample]['offset'])}"

    def path(self, sample: int) -> str:
        """Path of the shard that holds ``sample``."""
        return str(self.index.folder / self.index.shards[int(self.index.table[sample]["shard"])].name)

    def _file(self, shard: int) -> int:
        """A file handle of ``shard``; the least recently used ones are closed."""
        if shard not in self._files:
            path = self.index.folder / self.index.shards[shard].name
            try:
                self._files[shard] = os.open(path, os.O_RDONLY)
            except OSError as error:
                raise DataError(f"{path}: cannot be read, {error.strerror}") from error
            if len(self._files) > self._max_files:
                os.close(self._files.popitem(last=False)[1])
        self._files.move_to_end(shard)
        return self._files[shard]


def _close(files: OrderedDict[int, int]) -> None:
    for handle in files.values():
        os.close(handle)
    files.clear()
