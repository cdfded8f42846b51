"""Memory that worker processes write batches into and the training process reads in place, without a copy between them.

Buffers of equal layout in one anonymous file, which grows by a buffer when none is free: a consumer that keeps batches costs
memory, never a deadlock. A buffer is free again when the last array that was handed out of it is gone.

A process maps buffers for itself and a fork inherits no mapping, only the file. Drivers of GPUs take page-locked memory out of
forks, some do and some do not; a worker that is started after buffers were locked must not depend on it.
"""

import math
import mmap
import os
import weakref
from typing import NamedTuple

import numpy as np

from fastmae.files import anonymous_file

_PAGE = mmap.ALLOCATIONGRANULARITY


class Field(NamedTuple):
    """One array of a buffer."""

    dtype: str | np.dtype
    shape: tuple[int, ...]


class Buffers:
    """Buffers of the arrays ``fields``. Carried into forked workers, which map the same memory for themselves."""

    def __init__(self, fields: dict[str, Field]):
        self.fields = fields
        self._offsets, end = {}, 0  # count and offset of each array
        for name, field in fields.items():
            count = math.prod(field.shape)
            self._offsets[name] = count, end
            end += -(-count * np.dtype(field.dtype).itemsize // 64) * 64  # aligned to cache lines
        self.nbytes = -(-end // _PAGE) * _PAGE
        self._file = anonymous_file("fastmae-batches")
        weakref.finalize(self, os.close, self._file)
        self._count = 0
        self._free: list[int] = []
        self._maps: dict[int, mmap.mmap] = {}
        self._owner = os.getpid()  # of the maps
        self._of_parent: dict[int, mmap.mmap] = {}

    def take(self) -> int:
        """The number of a buffer that nobody uses, made now if there is none."""
        if self._free:
            return self._free.pop()
        self._count += 1
        os.ftruncate(self._file, self._count * self.nbytes)
        return self._count - 1

    def give(self, buffer: int) -> None:
        """``buffer`` is free again."""
        self._free.append(buffer)

    def array(self, buffer: int, name: str) -> np.ndarray:
        """The array ``name`` of ``buffer``, shared with every other process that asks for it."""
        field = self.fields[name]
        return np.frombuffer(self.memory(buffer), field.dtype, *self._offsets[name]).reshape(field.shape)

    def memory(self, buffer: int) -> mmap.mmap:
        """All bytes of ``buffer``, mapped by this process."""
        if self._owner != os.getpid():
            # Kept: to drop a mapping that this fork has not inherited would unmap whatever lies at its address by now.
            self._of_parent |= self._maps
            self._owner, self._maps = os.getpid(), {}
        if buffer not in self._maps:
            # All pages at once: one by one, as images of other sizes reach other pages, their faults take about a twentieth of
            # the rate of decoding alone (two EPYC cores).
            flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
            self._maps[buffer] = mmap.mmap(self._file, self.nbytes, flags, offset=buffer * self.nbytes)
            self._maps[buffer].madvise(mmap.MADV_DONTFORK)
        return self._maps[buffer]
