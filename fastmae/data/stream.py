"""Shards without an index, read from start to end through webdataset: local tars, gzipped tars, or URLs.

The promise is weaker than that of indexed shards: the order is fresh in every pass and fixed by the seed for a given number
of ranks and workers, but differs between such numbers; samples lost inside a damaged tar are not noticed by webdataset; a
resumed run starts a new pass instead of continuing the old one. Nothing is unpickled, and no ``pipe:`` command is run.
"""

import itertools
import random
import shutil
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import xxhash
from torch.utils.data import IterableDataset, get_worker_info

from fastmae.data.batch import Batch, LoaderConfig, crop_batch
from fastmae.data.decode import DecodeError, decode
from fastmae.data.write import UNFINISHED
from fastmae.errors import DataError, InputError
from fastmae.kernels.philox import ORDER, permutation
from fastmae.optional import require

_IMAGES = ("jpg", "jpeg", "png", "webp", "ppm", "bmp", "gif")
_SCHEMES = ("https", "http", "file")
_SHUFFLE_BUFFER = 1000  # samples, compressed


def find_shards(data: str | Path, world_size: int) -> list[str]:
    """The shards that ``data`` names: a folder of tars, or paths or URLs with {000..999} expanded.

    Raises InputError if there are none, or fewer than ranks, or on a ``pipe:`` URL.
    """
    text = str(data)
    if Path(text).is_dir():
        if (Path(text) / UNFINISHED).exists():
            raise InputError(f"{text}: the build of these shards was not finished; remove the folder and build them again")
        shards = sorted(str(p) for p in Path(text).iterdir() if p.name.endswith((".tar", ".tar.gz", ".tgz")))
        if not shards:
            raise InputError(f"{text}: no shards; give a folder with index.json or tars, as `fastmae shards` writes")
    else:
        braceexpand = require("braceexpand", "a pattern of shards")
        try:
            shards = list(braceexpand.braceexpand(text))
        except ValueError as error:
            raise InputError(f"{text}: braces do not match ({error}); give a pattern like a-{{000..099}}.tar") from error
        for shard in shards:
            scheme, colon, _ = shard.partition(":")
            if colon and scheme not in _SCHEMES:
                raise InputError(f"{shard}: only {', '.join(_SCHEMES)} URLs are read; pipe: runs shell commands and is refused")
        if any("://" in s for s in shards) and shutil.which("curl") is None:
            raise InputError(f"{text}: URLs are read by the program curl, which is not installed")
        missing = [s for s in shards if "://" not in s and not Path(s).is_file()]
        if missing:
            raise InputError(
                f"{missing[0]}: no such shard or folder; give a folder of shards, or a pattern like a-{{000..099}}.tar"
            )
    if len(shards) < world_size:
        raise InputError(f"{text}: {len(shards)} shards cannot feed {world_size} ranks; write smaller shards, or index them")
    return shards


class StreamedBatches(IterableDataset):
    """One rank's endless batches; every worker of it reads shards of its own."""

    def __init__(self, shards: list[str], config: LoaderConfig, batch_size: int, rank: int, world_size: int, start: int):
        self.shards, self.config, self.batch_size = shards, config, batch_size
        self.rank, self.world_size, self.start = rank, world_size, start

    def __iter__(self) -> Iterator:
        samples = self._decoded()
        while True:
            replaced: list[str] = []
            try:
                chosen = list(itertools.islice(_usable(samples, replaced), self.batch_size))
            except DataError as error:
                yield error
                return
            pixels, ids, epochs, labels = zip(*chosen, strict=True)
            ids, epochs, labels = (np.array(v, dtype=np.int64) for v in (ids, epochs, labels))
            images = crop_batch(list(pixels), ids, epochs, self.config)
            yield Batch(images, *map(torch.from_numpy, (ids, epochs, labels)), tuple(replaced))

    def _decoded(self) -> Iterator[tuple]:
        """Endless (pixels, id, epoch, label), or a line of text for a sample that cannot be used."""
        wds = require("webdataset", "streaming shards")
        worker = get_worker_info()
        worker, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        # Passes are numbered from ``start``, so that a resumed run repeats neither an order nor a mask.
        for epoch in itertools.count(self.start):
            order = permutation(self.config.seed, ORDER, epoch & 0xFFFFFFFF, len(self.shards)).tolist()
            mine = [self.shards[i] for i in order][self.rank :: self.world_size][worker::workers]
            generator = random.Random(f"{self.config.seed} {epoch} {self.rank} {worker}")
            pipeline = wds.DataPipeline(
                wds.SimpleShardList(mine),
                wds.tarfile_to_samples(select_files=lambda name: name.rpartition(".")[2].lower() in (*_IMAGES, "cls")),
                wds.shuffle(_SHUFFLE_BUFFER, rng=generator),
            )
            found = False
            try:
                for sample in pipeline:
                    found = True
                    yield self._decode(sample, epoch)
            except (OSError, ValueError, EOFError, tarfile.TarError, zlib.error) as error:
                raise DataError(f"a shard of {', '.join(mine[:3])}... cannot be read: {error}") from error
            if not found:
                raise DataError(f"{', '.join(mine[:3])}: no images in these shards; looked for {', '.join(_IMAGES)} members")

    def _decode(self, sample: dict, epoch: int) -> tuple | str:
        name = f"{sample['__url__']}: {sample['__key__']}"
        image = next((sample[e] for e in _IMAGES if e in sample), None)
        if image is None:
            return f"{name}: has no image"
        try:
            pixels = decode(image, self.config.channels)
        except DecodeError as error:
            return f"{name}: {error}"
        label = sample.get("cls", b"-1").strip()
        number = xxhash.xxh3_64_intdigest(sample["__key__"].encode()) >> 1  # fits a signed 64-bit integer
        return pixels, number, epoch, int(label) if label.lstrip(b"-").isdigit() else -1


def _usable(samples: Iterator, replaced: list[str]) -> Iterator[tuple]:
    for sample in samples:
        if isinstance(sample, str):
            replaced.append(sample)
            if len(replaced) > 1000:
                raise DataError(f"1000 samples on end cannot be used; the last: {sample}")
        else:
            yield sample
