"""Shards without an index, read from start to end through webdataset: local tars, gzipped tars, or URLs.

The promise is weaker than that of indexed shards: the order is fresh in every pass and fixed by the seed for a given number
of ranks and workers, but differs between such numbers; a resumed run starts a new pass instead of continuing the old one;
damage inside a tar is noticed only where it ends the reading of it. Nothing is unpickled.
"""

import contextlib
import itertools
import os
import random
import tarfile
import zlib
from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
import xxhash
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from fastmae.clock import LOOK
from fastmae.data.augment import DRAWS, draw_crop
from fastmae.data.batch import Batch, LoaderConfig
from fastmae.data.torch_workers import ignore_signals, patiently
from fastmae.errors import DataError
from fastmae.images.decode import DecodeError, decode
from fastmae.images.resize import resized_crop
from fastmae.kernels.philox import CROPS, ORDER, permutation, uniform
from fastmae.optional import require
from fastmae.shards.samples import IMAGES, label_of
from fastmae.shards.urls import open_shards

_SHUFFLE_BUFFER = 1000  # samples, compressed


def streamed_batches(shards: list[str], config: LoaderConfig, batch_size: int, rank: int, world_size: int, start: int,
                     device: torch.device) -> Iterator[Batch]:  # fmt: skip
    """Endless batches on ``device``, made by torch's DataLoader. Raises DataError on a bad shard or a dead worker."""
    workers = min(config.workers, len(shards) // world_size)
    loader = DataLoader(
        StreamedBatches(shards, config, batch_size, rank, world_size, start),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=max(2, -(-config.prefetch // workers)) if workers else None,
        pin_memory=device.type == "cuda",
        worker_init_fn=ignore_signals,
        timeout=min(LOOK, config.timeout) if workers else 0,
    )
    with contextlib.closing(patiently(loader, config.timeout, f"{shards[0]} and others")) as batches:
        for batch in batches:
            if isinstance(batch, DataError):
                raise batch
            yield Batch(*(t.to(device, non_blocking=True) for t in batch[:4]), *batch[4:])


class StreamedBatches(IterableDataset):
    """One rank's endless batches; every worker of it reads shards of its own."""

    def __init__(self, shards: list[str], config: LoaderConfig, batch_size: int, rank: int, world_size: int, start: int):
        self.shards, self.config, self.batch_size = shards, config, batch_size
        self.rank, self.world_size, self.start = rank, world_size, start

    def __iter__(self) -> Iterator:
        samples = itertools.chain.from_iterable(map(self._views, self._decoded()))
        worker, workers = _place()
        for number in itertools.count(worker, workers):  # DataLoader takes from its workers in turns
            size = self.config.size_at(self.start + number * self.world_size * self.batch_size)
            replaced: list[str] = []
            try:
                chosen = list(itertools.islice(_usable(samples, replaced), self.batch_size))
            except DataError as error:
                yield error
                return
            pixels, ids, epochs, labels = zip(*chosen, strict=True)
            ids, epochs, labels = (np.array(v, dtype=np.int64) for v in (ids, epochs, labels))
            images = _crop_batch(list(pixels), ids, epochs, size, self.config)
            yield Batch(images, *map(torch.from_numpy, (ids, epochs, labels)), tuple(replaced))

    def _decoded(self) -> Iterator[tuple]:
        """Endless (pixels, id, epoch, label), or a line of text for a sample that cannot be used."""
        wds = require("webdataset", "streaming shards")
        worker, workers = _place()
        tar_file_expander, group_by_keys = wds.tariterators.tar_file_expander, wds.tariterators.group_by_keys
        # Passes are numbered from ``start``, so that a resumed run repeats neither an order nor a mask.
        for epoch in itertools.count(self.start):
            order = permutation(self.config.seed, ORDER, epoch & 0xFFFFFFFF, len(self.shards)).tolist()
            mine = [self.shards[i] for i in order][self.rank :: self.world_size][worker::workers]
            opened: list[str] = []
            generator = random.Random(f"{self.config.seed} {epoch} {self.rank} {worker}")
            pipeline = wds.DataPipeline(
                partial(open_shards, mine, opened),
                partial(tar_file_expander, select_files=_is_wanted),
                group_by_keys,
                wds.shuffle(_SHUFFLE_BUFFER, rng=generator),
            )
            found = False
            try:
                for sample in pipeline:
                    found = True
                    yield self._decode(sample, epoch)
            except DataError:
                raise
            except (OSError, ValueError, EOFError, tarfile.TarError, zlib.error) as error:
                at = opened[-1] if opened else mine[0]
                raise DataError(f"{at}: cannot be read: {error.args[0] if error.args else error}") from error
            if not found:
                raise DataError(f"{', '.join(mine[:3])}: no images in these shards; looked for {', '.join(IMAGES)} members")

    def _views(self, sample: tuple | str) -> list[tuple | str]:
        """The views of a sample, side by side, each as if in an epoch of its own."""
        if isinstance(sample, str):
            return [sample]
        pixels, number, epoch, label = sample
        return [(pixels, number, epoch * self.config.views + view, label) for view in range(self.config.views)]

    def _decode(self, sample: dict, epoch: int) -> tuple | str:
        name = f"{sample['__url__']}: {sample['__key__']}"
        image = next((sample[e] for e in IMAGES if e in sample), None)
        if image is None:
            return f"{name}: has no image"
        try:
            pixels = decode(image, self.config.channels)
        except DecodeError as error:
            return f"{name}: {error}"
        label = label_of(sample.get("cls", b"-1"))
        if label is None:
            return f"{name}: its class is no whole number, got {sample['cls'][:32]!r}"
        number = xxhash.xxh3_64_intdigest(os.fsencode(sample["__key__"])) >> 1  # fits a signed 64-bit integer
        return pixels, number, epoch, label


def _place() -> tuple[int, int]:
    """This worker's number, and how many there are."""
    worker = get_worker_info()
    return (worker.id, worker.num_workers) if worker else (0, 1)


def _is_wanted(name: str) -> bool:
    return name.rpartition(".")[2].lower() in (*IMAGES, "cls")


def _usable(samples: Iterator, replaced: list[str]) -> Iterator[tuple]:
    for sample in samples:
        if isinstance(sample, str):
            replaced.append(sample)
            if len(replaced) > 1000:
                raise DataError(f"1000 samples of one batch cannot be used; the last: {sample}")
        else:
            yield sample


def _crop_batch(images: list[np.ndarray], ids: np.ndarray, epochs: np.ndarray, size: tuple[int, int],
                config: LoaderConfig) -> Tensor:  # fmt: skip
    """Crops (B, C, H, W) uint8 of decoded images (H, W, C), each a function of (seed, epoch, sample id) alone."""
    draws = uniform(config.seed, CROPS, torch.from_numpy(epochs), torch.from_numpy(ids), DRAWS).numpy()
    out = torch.empty(len(images), config.channels, *size, dtype=torch.uint8)
    for i, (image, numbers) in enumerate(zip(images, draws, strict=True)):
        box, flip = draw_crop(numbers, *image.shape[:2], config.augment)
        out[i] = resized_crop(image, box, size, flip)
    return out
