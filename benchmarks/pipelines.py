"""Pipelines from shards to batches: parts of fastmae's loader alone, the full loader, and other loaders.

Each is a function of a number of batches that returns the seconds one took; every call starts a new pipeline, so that nothing
was prefetched while another was measured. All draw their crops from the same distribution.
"""

import io
import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import simplejpeg
import torch
import webdataset as wds
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastmae.data.augment import DRAWS, Augment, crop_box
from fastmae.data.batch import LoaderConfig
from fastmae.data.indexed_batches import IndexedBatches
from fastmae.data.order import Order
from fastmae.images.resize import resized_crop
from fastmae.shards.index import JSON_NAME, Index
from fastmae.shards.index_tars import index_shards
from fastmae.shards.read import ShardReader

BATCH = 256
SIZE = (224, 224)
_AUGMENT = Augment()
_WARM_UP = 8  # batches: by then every buffer has been used, as in a long run


class Bare:
    """Parts of the loader's work alone, in one thread of this process."""

    def __init__(self, index: Index):
        self.reader = ShardReader(index)
        self.ids = Order(len(index), 0).at(np.arange(BATCH * -(-len(index) // BATCH)))[0].tolist()
        self.data = [self.reader.read(i) for i in self.ids]
        self.draws = np.random.default_rng(0).random((len(self.ids), DRAWS), np.float32)
        self.memory = np.empty(1 << 24, np.uint8)

    def read(self, batches: int) -> float:
        """Indexed reads in random order, with checksums."""
        return self._time(lambda i: self.reader.view(self.ids[i]), batches)

    def decode(self, batches: int) -> float:
        """Decoding from memory."""
        return self._time(lambda i: self._pixels(i), batches)

    def crop(self, batches: int) -> float:
        """Decoding, and torch's antialiased bicubic crop."""

        def one(i: int) -> None:
            pixels = self._pixels(i)
            resized_crop(pixels, crop_box(self.draws[i], *pixels.shape[:2], _AUGMENT), SIZE)

        return self._time(one, batches)

    def pillow(self, batches: int) -> float:
        """The reference's work: Pillow from bytes to a normalised float tensor."""
        return self._time(lambda i: pillow_tensor(self.data[i], self.draws[i]), batches)

    def _pixels(self, i: int) -> np.ndarray:
        height, width, _, _ = simplejpeg.decode_jpeg_header(self.data[i])
        fits = height * width * 3 <= self.memory.size
        return simplejpeg.decode_jpeg(self.data[i], "RGB", buffer=self.memory if fits else None)

    def _time(self, one: Callable[[int], object], batches: int) -> float:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            began = time.perf_counter()
            for n in range(batches * BATCH):
                one(n % len(self.ids))
            return (time.perf_counter() - began) / batches
        finally:
            torch.set_num_threads(threads)


class Ours:
    """fastmae's loader up to the batch in shared memory. ``cpu_seconds``: of the training process's main thread, per batch."""

    def __init__(self, index: Index, workers: int, *, on_device: bool):
        self.index, self.config, self.on_device = index, LoaderConfig(image_size=SIZE, workers=workers), on_device
        self.cpu_seconds: list[float] = []

    def __call__(self, batches: int) -> float:
        """Seconds of one batch."""
        source = IndexedBatches(self.index, self.config, batch_size=BATCH, rank=0, world_size=1, start=0,
                                on_device=self.on_device)  # fmt: skip
        try:
            for _ in range(_WARM_UP):
                source.buffers.give(next(source).buffer)
            began, cpu = time.perf_counter(), time.thread_time()
            for _ in range(batches):
                source.buffers.give(next(source).buffer)
            self.cpu_seconds.append((time.thread_time() - cpu) / batches)
            return (time.perf_counter() - began) / batches
        finally:
            source.close()


def reference_loader(index: Index, workers: int) -> Callable[[int], float]:
    """torch's DataLoader over a data set that reads a file and does ``pillow_tensor``: the reference's pipeline."""
    return lambda batches: _time_loader(
        DataLoader(_PillowImages(index), BATCH, shuffle=True, num_workers=workers, drop_last=True), batches
    )


def webdataset_loader(index: Index, workers: int) -> Callable[[int], float]:
    """Plain webdataset over the shards' tars, decoded by Pillow, cropped, batched by torch's DataLoader."""
    urls = [str(index.folder / shard.name) for shard in index.shards]

    def run(batches: int) -> float:
        # resampled: endless, and any number of workers may read any number of shards
        data = wds.WebDataset(urls, resampled=True, shardshuffle=False).shuffle(1000).map(_pillow_sample)
        return _time_loader(DataLoader(data, BATCH, num_workers=workers), batches)

    return run


def pillow_tensor(data: bytes, draws: np.ndarray) -> Tensor:
    """(3, H, W) float32, normalised: decode, crop, bicubic resize, flip and tensor by Pillow and torch."""
    with Image.open(io.BytesIO(data)) as image:
        picture = image.convert("RGB")
    top, left, height, width = crop_box(draws, picture.height, picture.width, _AUGMENT)
    box = (left, top, left + width, top + height)
    picture = picture.crop(box).resize(SIZE[::-1], Image.Resampling.BICUBIC)
    if draws[0] < 0.5:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    x = torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous().float().div(255)
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return x.sub_(mean).div_(std)


class _PillowImages(Dataset):
    """Images by number, as from a folder of files."""

    def __init__(self, index: Index):
        self.reader = ShardReader(index)
        self.copies = -(-BATCH * 16 * (os.cpu_count() or 1) // len(index))  # long enough that no epoch ends while it is timed

    def __len__(self) -> int:
        return self.copies * len(self.reader.index)

    def __getitem__(self, number: int) -> tuple[Tensor, int]:
        data = self.reader.read(number % len(self.reader.index))
        return pillow_tensor(data, np.random.default_rng(number).random(DRAWS, np.float32)), 0


def _pillow_sample(sample: dict) -> tuple[Tensor, int]:
    data = next(sample[e] for e in ("jpg", "jpeg", "png", "webp") if e in sample)
    return pillow_tensor(data, np.random.default_rng(len(data)).random(DRAWS, np.float32)), 0


def _time_loader(loader: DataLoader, batches: int) -> float:
    # Each worker makes complete batches, so they arrive in bursts of one per worker.
    workers = loader.num_workers
    batches = workers * -(-max(batches, 4 * workers) // workers)
    source = _endless(loader)
    for _ in range(max(_WARM_UP, 3 * workers)):
        next(source)
    began = time.perf_counter()
    for _ in range(batches):
        next(source)
    seconds = (time.perf_counter() - began) / batches
    source.close()
    return seconds


def _endless(loader: Iterable) -> Iterator:
    while True:
        yield from loader


def folder_bytes(index: Index) -> float:
    """Mean bytes of an image."""
    return float(index.table["size"].mean())


def open_index(folder: Path, scratch: Path) -> Index:
    """The index of ``folder``; for tars without one, an index made in ``scratch``."""
    return Index.load(folder) if (folder / JSON_NAME).exists() else index_shards(folder, scratch)
