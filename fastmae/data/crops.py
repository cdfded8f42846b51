"""What a worker does: bytes to pixels to crops, written into a buffer.

Two modes, with the same crops from the same keys. ``cpu``: every crop is resized here. ``device``: pixels are decoded into the
buffer and the device crops and resizes them (``kernels/resized_crop.py``); of an image too large for its region the crop alone
is stored, and if that is too large, it is resized here all the same. Which of these depends on the sample alone, so results do
not depend on how samples are spread over workers.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from fastmae.data.augment import DRAWS, draw_crop
from fastmae.data.batch import LoaderConfig
from fastmae.data.shared_memory import Buffers, Field
from fastmae.errors import SampleError
from fastmae.images.decode import decode
from fastmae.images.resize import resized_crop
from fastmae.kernels.philox import CROPS, uniform
from fastmae.optional import require
from fastmae.shards.read import ShardReader

_REASON = 200  # characters
Arrays = dict[str, np.ndarray]
"""The arrays of a buffer, by the names of ``buffer_fields``."""


class Task(NamedTuple):
    """Rows ``first`` to ``last`` of ``buffer``, images of height x width."""

    buffer: int
    first: int
    last: int
    height: int
    width: int


CROP_ROW = np.dtype([("offset", "<i8"), ("width", "<i4"), ("box", "<i4", 4), ("flip", "|b1")])
"""What the device needs to make one crop: offset of the first pixel in the buffer's regions, width of the pixels; top, left,
height and width of the crop in them; whether it is mirrored."""


def buffer_fields(config: LoaderConfig, batch_size: int, region: int | None) -> dict[str, Field]:
    """The arrays of a buffer: what a worker is asked for (``ids``, ``epochs``), and what it answers.

    ``region``: bytes for the pixels of one crop, or None to store resized images.
    """
    fields = {"ids": Field("<i8", (batch_size,)), "epochs": Field("<i8", (batch_size,))}
    if region is None:
        height, width = (max(s[i] for s in config.all_sizes) for i in (0, 1))
        return fields | {"images": Field("|u1", (batch_size * height * width * config.channels,))}
    return fields | {"regions": Field("|u1", (batch_size, region)), "crops": Field(CROP_ROW, (batch_size,))}


class Cropper:
    """Fills rows of buffers. ``region`` as in ``buffer_fields``."""

    def __init__(self, reader: ShardReader, buffers: Buffers, config: LoaderConfig, region: int | None):
        self.reader, self.buffers, self.config, self.region = reader, buffers, config, region
        require("simplejpeg", "decoding JPEGs")  # once, and not in each worker
        self._last: tuple[int, np.ndarray] | None = None
        self._scratch = np.empty(0, np.uint8)

    def __call__(self, task: Task, at: Callable[[int], None]) -> list[tuple[int, int, str]]:
        """Do one ``Task``; return (row, sample, reason) for each sample that cannot be used.

        Raises DataError if anything is wrong with a shard.
        """
        buffer, first, last, *size = task
        arrays = {name: self.buffers.array(buffer, name) for name in self.buffers.fields}
        ids, epochs = (arrays[name][first:last] for name in ("ids", "epochs"))
        keys = torch.from_numpy(epochs.copy()), torch.from_numpy(ids.copy())
        draws = uniform(self.config.seed, CROPS, *keys, DRAWS).numpy()
        fill = self._fill_image if self.region is None else self._fill_region
        self._last = None  # it may lie in a buffer that is in other use by now
        bad = []
        for row, sample, numbers in zip(range(first, last), ids.tolist(), draws, strict=True):
            at(sample)
            try:
                fill(arrays, row, sample, numbers, tuple(size))
            except SampleError as error:
                bad.append((row, sample, str(error)[:_REASON]))
        return bad

    def _fill_image(self, arrays: Arrays, row: int, sample: int, draws: np.ndarray, size: tuple[int, int]) -> None:
        pixels = self._pixels(sample, None)
        box, flip = draw_crop(draws, *pixels.shape[:2], self.config.augment)
        n = size[0] * size[1] * self.config.channels
        # Dense at every size, so that the device copies them in one piece.
        pixels_out = arrays["images"][row * n : (row + 1) * n]
        resized_crop(pixels, box, size, flip, out=torch.from_numpy(pixels_out).view(*size, -1).permute(2, 0, 1))

    def _fill_region(self, arrays: Arrays, row: int, sample: int, draws: np.ndarray, size: tuple[int, int]) -> None:
        regions = arrays["regions"]
        pixels = self._pixels(sample, regions[row])
        box, flip = draw_crop(draws, *pixels.shape[:2], self.config.augment)
        offset = _address(pixels) - _address(regions)
        if 0 <= offset < regions.size:  # decoded in place, or there for an earlier view
            arrays["crops"][row] = offset, pixels.shape[1], box, flip
            return
        top, left, height, width = box
        part = pixels[top : top + height, left : left + width]
        if part.size > self.region:
            part = resized_crop(pixels, box, size).permute(1, 2, 0).numpy()  # the device's filter leaves its size as it is
        regions[row, : part.size].reshape(part.shape)[:] = part
        arrays["crops"][row] = row * self.region, part.shape[1], (0, 0, *part.shape[:2]), flip

    def _pixels(self, sample: int, into: np.ndarray | None) -> np.ndarray:
        """Decoded pixels (H, W, C), in ``into`` if they fit; views of one sample stand side by side and are decoded once."""
        if self._last is None or self._last[0] != sample:
            self._last = None  # its memory is about to be overwritten
            data = self.reader.view(sample)
            pixels = decode(data, self.config.channels, self._scratch if into is None else into)
            if into is None and pixels.size > self._scratch.size:
                # Room for the next of this size: fresh memory costs a fault for each page.
                self._scratch = np.empty(min(pixels.size, 1 << 24), np.uint8)
            self._last = sample, pixels
        return self._last[1]


def _address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]
