"""Batches for one rank, on its device, made by worker processes from indexed shards or from a stream.

Bad samples are counted and named; more of them than the budget, and anything wrong with a shard, ends the run.
"""

from collections.abc import Iterator
from pathlib import Path

import torch

from fastmae.data.batch import Batch, LoaderConfig
from fastmae.data.indexed_batches import LOST_BEFORE_BUDGET, IndexedBatches
from fastmae.data.source import Source
from fastmae.data.streamed_batches import streamed_batches
from fastmae.data.to_device import device_batches
from fastmae.errors import DataError, InputError


class Loader:
    """An endless iterator of ``Batch`` for one rank, over indexed shards or a stream."""

    def __init__(self, data: str | Path | Source, config: LoaderConfig, *, batch_size: int, rank: int = 0, world_size: int = 1,
                 device: torch.device | str = "cpu", state: dict | None = None):  # fmt: skip
        """``data``: a ``Source``, opened for ``world_size`` ranks, or what one is opened from.

        ``state``: what ``state()`` gave where to continue, on any number of ranks. Raises InputError or DataError naming what
        is wrong.
        """
        if not isinstance(data, Source):
            data = Source(data, world_size=world_size, allow_pipe=config.allow_pipe)
        self.source, self.config, self.device = data, config, torch.device(device)
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self.start = state["samples"] if state else 0
        self.seen = self.lost = 0
        self.crop = "cpu"
        if data.index is not None:
            self.crop = ("device" if self.device.type == "cuda" else "cpu") if config.crop == "auto" else config.crop
        else:
            given = {"--crop device": config.crop == "device", "--shuffle-window": config.shuffle_window is not None}
            if flags := [flag for flag, is_given in given.items() if is_given]:
                raise InputError(
                    f"{data.data}: has no index, and a stream is decoded and cropped on the CPU and shuffled in its own way: "
                    f"remove {' and '.join(flags)}, or make an index with `fastmae shards index`"
                )
        if state:
            self._check(state)

    def state(self, samples: int) -> dict:
        """The position after ``samples`` samples of the run, over all ranks, as plain JSON."""
        return {
            "epoch": samples / self.source.samples if self.source.samples else None,
            "samples": samples,
            "seed": self.config.seed,
            "views": self.config.views,
            "shuffle_window": self.config.shuffle_window,
            "fingerprint": self.source.fingerprint,
        }

    def describe(self) -> str:
        """One line on how batches are made."""
        config = self.config
        where = f"{config.workers} worker{'s' * (config.workers > 1)}" if config.workers else "this process"
        views = f", {config.views} views of each image" if config.views > 1 else ""
        if self.source.index is None:
            return f"{where}, streamed, cropped on the CPU{views}"
        mixed = "all samples mixed" if config.shuffle_window is None else f"mixed within {config.shuffle_window} shards"
        return f"{where}, {len(self.source.index.shards)} shards, {mixed}, cropped on the {self.crop}{views}".replace(
            "the cpu", "the CPU"
        )

    def __iter__(self) -> Iterator[Batch]:
        if self.source.index is None:
            batches = streamed_batches(
                self.source.shards, self.config, self.batch_size, self.rank, self.world_size, self.start, self.device
            )
        else:
            indexed = IndexedBatches(self.source.index, self.config, batch_size=self.batch_size, rank=self.rank,
                                     world_size=self.world_size, start=self.start, on_device=self.crop == "device")  # fmt: skip
            batches = _closing(indexed, self.device)
        try:
            yield from batches if self.source.index is not None else map(self._counted, batches)
        finally:
            batches.close()

    def _check(self, state: dict) -> None:
        """Raise InputError unless ``state`` is a position in this loader's own order."""
        if state["fingerprint"] != self.source.fingerprint:
            raise InputError(
                f"{self.source.data}: other data than this run began with, fingerprint {self.source.fingerprint} here and "
                f"{state['fingerprint']} in the checkpoint; give that data or another --out"
            )
        for name in ("seed", "views", "shuffle_window"):
            if state[name] != getattr(self.config, name):
                raise InputError(
                    f"the order of samples was made with {name} {state[name]}, not {getattr(self.config, name)}; "
                    "give that value or another --out"
                )

    def _counted(self, batch: Batch) -> Batch:
        """A stream's ``batch``, counted: its length is not known. Raises DataError if too many samples could not be used."""
        self.seen += len(batch.sample_ids)
        self.lost += len(batch.replaced)
        if batch.replaced and self.lost > max(LOST_BEFORE_BUDGET, self.config.bad_budget * self.seen):
            error = DataError(
                f"{self.lost} of {self.seen} samples could not be used, more than the budget of "
                f"{self.config.bad_budget:.2%}; the last: {batch.replaced[-1]}"
            )
            for line in batch.replaced:
                error.add_note(line)
            raise error
        return batch


def _closing(source: IndexedBatches, device: torch.device) -> Iterator[Batch]:
    try:
        yield from device_batches(source, device)
    finally:
        source.close()
