"""Micro-batches of indexed shards: the exact order of ``order.py``, read at random, from any position on.

A sample that cannot be decoded is named and replaced by the next in order that can; anything wrong with a shard is an error.
"""

import numpy as np
import torch
from torch.utils.data import Dataset

from fastmae.data.batch import Batch, LoaderConfig, crop_batch
from fastmae.data.decode import DecodeError, decode
from fastmae.data.index import Index
from fastmae.data.order import Order, batch_positions
from fastmae.data.read import ShardReader
from fastmae.errors import DataError


class IndexedBatches(Dataset):
    """Micro-batch m of one rank, for any m >= 0."""

    def __init__(self, index: Index, config: LoaderConfig, batch_size: int, rank: int, world_size: int, start: int):
        self.reader = ShardReader(index)
        self.order = Order(len(index), config.seed)
        self.config, self.batch_size, self.rank, self.world_size, self.start = (
            config,
            batch_size,
            rank,
            world_size,
            start,
        )

    def __getitem__(self, micro_batch: int) -> Batch | DataError:
        positions = batch_positions(micro_batch, self.batch_size, self.rank, self.world_size, self.start)
        try:
            return self._load(positions)
        except DataError as error:  # returned, not raised: torch would bury the message in a worker's traceback
            return error

    def _load(self, positions: np.ndarray) -> Batch:
        ids, epochs = self.order.at(positions)
        decoded, replaced = [], []
        for i, position in enumerate(positions):
            pixels, ids[i], epochs[i] = self._decode(int(position), int(ids[i]), int(epochs[i]), replaced)
            decoded.append(pixels)
        images = crop_batch(decoded, ids, epochs, self.config)
        labels = self.reader.index.table["label"][ids].astype(np.int64)
        return Batch(images, *map(torch.from_numpy, (ids, epochs, labels)), tuple(replaced))

    def _decode(self, position: int, sample: int, epoch: int, replaced: list[str]) -> tuple[np.ndarray, int, int]:
        """Pixels of the sample at ``position``, or of the next in order that decodes."""
        for ahead in range(1, 2 + len(self.reader.index)):
            try:
                return decode(self.reader.read(sample), self.config.channels), sample, epoch
            except DecodeError as error:
                replaced.append(f"{self.reader.name(sample)}: {error}")
            (sample,), (epoch,) = (v.tolist() for v in self.order.at(np.array([position + ahead])))
        raise DataError(f"{self.reader.index.folder}: no sample can be decoded; the last: {replaced[-1]}")
