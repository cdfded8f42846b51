"""Batches for one rank, made by worker processes from indexed shards or from a stream.

Bad samples are counted and named; more of them than the budget, and anything wrong with a shard, ends the run.
"""

import signal
from collections.abc import Iterator
from multiprocessing import active_children
from pathlib import Path

from torch.utils.data import DataLoader

from fastmae.data.batch import Batch, LoaderConfig
from fastmae.data.index import JSON_NAME, Index
from fastmae.data.indexed import IndexedBatches
from fastmae.data.stream import StreamedBatches, find_shards
from fastmae.errors import DataError

_LOST_BEFORE_BUDGET = 16  # bad samples that a run survives however short it is


def _ignore_signals(_: int) -> None:
    """A signal to the whole process group is for the training process: it saves and ends its workers itself."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


class Loader:
    """An endless iterator of ``Batch`` for one rank, over indexed shards or a stream.

    ``samples`` is the number of samples per epoch, None for a stream; ``fingerprint`` names the data.
    """

    def __init__(self, data: str | Path, config: LoaderConfig, *, batch_size: int, rank: int = 0, world_size: int = 1,
                 start: int = 0):  # fmt: skip
        """Open ``data``: a folder with an index, a folder of tars, or a pattern of paths or URLs with {000..999} in it.

        ``start``: samples of the whole run consumed before. Raises InputError or DataError naming what is wrong.
        """
        self.config = config
        self.seen = self.lost = 0
        is_indexed = (Path(data) / JSON_NAME).is_file()
        workers = config.workers
        if is_indexed:
            index = Index.load(data)
            self.samples, self.fingerprint = len(index), index.fingerprint
            dataset = IndexedBatches(index, config, batch_size, rank, world_size, start)
        else:
            shards = find_shards(data, world_size)
            self.samples, self.fingerprint = None, f"stream of {len(shards)} shards"
            workers = min(workers, len(shards) // world_size)
            dataset = StreamedBatches(shards, config, batch_size, rank, world_size, start)
        self._loader = DataLoader(
            dataset,
            batch_size=None,
            sampler=range(2**62) if is_indexed else None,
            num_workers=workers,
            prefetch_factor=config.prefetch if workers else None,
            pin_memory=config.pin_memory,
            worker_init_fn=_ignore_signals,
        )

    def __iter__(self) -> Iterator[Batch]:
        others = set(active_children())
        batches = iter(self._loader)
        workers = set(active_children()) - others
        try:
            for batch in batches:
                yield self._checked(batch)
        finally:
            del batches  # its last reference: asks the workers to end, and waits for some seconds
            for worker in workers:
                if worker.is_alive():  # stuck in a read; it ignores milder signals
                    worker.kill()

    def _checked(self, batch: Batch | DataError) -> Batch:
        """``batch``, counted. Raises DataError if it is one, or if too many samples could not be used."""
        if isinstance(batch, DataError):
            raise batch
        self.seen += len(batch.sample_ids)
        self.lost += len(batch.replaced)
        if self.lost > max(_LOST_BEFORE_BUDGET, self.config.bad_budget * self.seen):
            raise DataError(
                f"{self.lost} of {self.seen} samples could not be used, more than the budget of "
                f"{self.config.bad_budget:.2%}; the last: {batch.replaced[-1]}"
            )
        return batch
