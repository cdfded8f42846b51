"""From workers' buffers to tensors on the device: copied beside the training step, cropped there if asked for.

On a GPU a buffer is page-locked memory, its copy runs on a stream of its own, and the next batch is on its way while the
present one is used. On a CPU the tensors are the buffer's own memory, and the buffer is free when they are gone.
"""

import contextlib
import math
import warnings
import weakref
from collections import deque
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from fastmae.data.batch import Batch
from fastmae.data.indexed_batches import BufferedBatch, IndexedBatches
from fastmae.data.shared_memory import Buffers
from fastmae.kernels import resized_crop

_LEAD = 16  # batches that a program may be ahead of its device


def device_batches(source: IndexedBatches, device: torch.device) -> Iterator[Batch]:
    """The batches of ``source`` as tensors on ``device``."""
    stage = Stage(source, device)
    return _ahead(source, stage) if device.type == "cuda" else map(stage.take, source)


class Stage:
    """Turns buffers into batches on one device. ``held`` keeps the memory that copies on their way still read."""

    def __init__(self, source: IndexedBatches, device: torch.device):
        self.source, self.buffers, self.device = source, source.buffers, device
        self.channels = source.config.channels
        self.labels = torch.from_numpy(source.reader.index.table["label"].astype(np.int64))
        self.held: list[Tensor] = []
        self._locks = PageLocks(source.buffers, device) if device.type == "cuda" else None

    def take(self, batch: BufferedBatch) -> Batch:
        """The batch on the device, copied there on the current stream without waiting."""
        if self._locks:
            self._locks.lock(batch.buffer)
        memory = self._borrow(batch, "images" if self.source.region is None else "regions")
        # What is small before what is large: a copy from pageable memory may wait for all others on its stream.
        ids = torch.from_numpy(batch.ids)
        keys = [self._to_device(t) for t in (ids, torch.from_numpy(batch.epochs), self.labels[ids])]
        images = self._images(batch, memory) if self.source.region is None else self._cropped(batch, memory)
        return Batch(images, *keys, tuple(batch.replaced), tuple(batch.notes))

    def _images(self, batch: BufferedBatch, memory: Tensor) -> Tensor:
        shape = (len(batch.ids), *batch.size, self.channels)
        return self._to_device(memory[: math.prod(shape)].view(shape)).permute(0, 3, 1, 2)

    def _cropped(self, batch: BufferedBatch, regions: Tensor) -> Tensor:
        crops = self.buffers.array(batch.buffer, "crops").copy()
        offset, width, box, flip = (self._to_device(torch.from_numpy(crops[name].copy())) for name in crops.dtype.names)
        return resized_crop(self._to_device(regions).flatten(), offset, width, box, flip, batch.size, self.channels)

    def _borrow(self, batch: BufferedBatch, name: str) -> Tensor:
        """The array ``name`` of the batch's buffer; the buffer is free again when neither it nor a view of it is left."""
        array = self.buffers.array(batch.buffer, name)
        weakref.finalize(array, self.buffers.give, batch.buffer).atexit = False
        return torch.from_numpy(array)

    def _to_device(self, x: Tensor) -> Tensor:
        if self.device.type == "cuda":
            self.held.append(x)
        return x.to(self.device, non_blocking=True)


class PageLocks:
    """Page-locks buffers, so that copies out of them do not wait. A buffer that cannot be locked is copied more slowly."""

    def __init__(self, buffers: Buffers, device: torch.device):
        self.buffers, self.device = buffers, device
        self._seen: dict[int, Tensor] = {}

    def lock(self, buffer: int) -> None:
        """Lock ``buffer``, once."""
        if buffer in self._seen:
            return
        memory = self._seen[buffer] = torch.frombuffer(self.buffers.memory(buffer), dtype=torch.uint8)
        runtime = torch.cuda.cudart()
        code = int(runtime.cudaHostRegister(memory.data_ptr(), memory.numel(), 0))
        if code == 0:
            weakref.finalize(memory, runtime.cudaHostUnregister, memory.data_ptr()).atexit = False
        else:
            # The error would otherwise be that of the next kernel, whose check clears it.
            with contextlib.suppress(RuntimeError):
                torch.ones(1, device=self.device) + 1
            size = memory.numel() >> 20
            warnings.warn(f"{size} MiB cannot be page-locked (CUDA error {code}), so copies to the GPU wait", stacklevel=2)


def _ahead(source: IndexedBatches, stage: Stage) -> Iterator[Batch]:
    """Batches on a GPU, each copied on a stream beside the training step, one ahead where workers are fast enough."""
    stream = torch.cuda.Stream(stage.device)
    on_their_way: deque[tuple[torch.cuda.Event, list[Tensor]]] = deque()

    def send(found: BufferedBatch) -> tuple[Batch, torch.cuda.Event]:
        with torch.cuda.stream(stream):
            batch, done = stage.take(found), stream.record_event()
        on_their_way.append((done, stage.held))
        stage.held = []
        return batch, done

    ahead = None
    used: deque[torch.cuda.Event] = deque()  # when the device was done with what came before each batch
    try:
        while True:
            batch, done = ahead or send(next(source))
            ahead = send(next(source)) if source.is_ready() else None
            current = torch.cuda.current_stream(stage.device)
            current.wait_event(done)
            for tensor in batch[:4]:
                tensor.record_stream(current)  # its memory belongs to the copying stream
            used.append(current.record_event())
            if len(used) > _LEAD:  # a program that only launches could be many batches of memory ahead of the device
                used.popleft().synchronize()
            yield batch
            del batch
            while on_their_way and on_their_way[0][0].query():
                on_their_way.popleft()
    finally:
        with contextlib.suppress(RuntimeError):  # of a device that has failed, which is reported already
            stream.synchronize()  # buffers are page-locked for as long as they are read
