"""Micro-batches of indexed shards: the exact order of ``order.py``, read at random, from any position on.

The training process decides which sample goes where; workers fill the buffers. A sample that cannot be used is named and
replaced by the next in order that can; anything wrong with a shard is an error.
"""

from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from fastmae.data.batch import LoaderConfig
from fastmae.data.crops import Cropper, Task, buffer_fields
from fastmae.data.order import Order, batch_positions
from fastmae.data.shared_memory import Buffers
from fastmae.errors import DataError
from fastmae.shards.index import Index
from fastmae.shards.read import ShardReader
from fastmae.workers import MAX_CRASHES, MAX_DEATHS, Death, WorkerPool

LOST_BEFORE_BUDGET = 16  # bad samples that a run survives however small its data set is
_TASK = (8, 128)  # samples in a task, at least and at most: each task has a cost of its own
_UNKNOWN_SIDE = 500  # pixels of the shorter side, where the index does not state it


@dataclass
class BufferedBatch:
    """A batch in its buffer, complete when no task is left."""

    buffer: int
    size: tuple[int, int]
    """(height, width) of its images."""
    positions: np.ndarray
    """(B,) int64: positions in the order."""
    ids: np.ndarray
    """(B,) int64."""
    epochs: np.ndarray
    """(B,) int64."""
    tasks: int = 0
    """Parts of it that are still being made."""
    tried: Counter = field(default_factory=Counter)
    """By row of the batch, samples that could not be used there."""
    replaced: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class IndexedBatches:
    """The endless micro-batches of one rank, in buffers; whoever takes one gives its buffer back to ``buffers``."""

    def __init__(self, index: Index, config: LoaderConfig, *, batch_size: int, rank: int, world_size: int, start: int,
                 on_device: bool):  # fmt: skip
        self.config, self.batch_size, self.rank, self.world_size, self.start = config, batch_size, rank, world_size, start
        self.reader = ShardReader(index)
        self.order = Order(
            len(index), config.seed, views=config.views, window=config.shuffle_window, shard_of=index.table["shard"]
        )
        self.region = region_bytes(index, config) if on_device else None
        self.buffers = Buffers(buffer_fields(config, batch_size, self.region))
        self._pool: WorkerPool | None = None
        self._pending: deque[BufferedBatch] = deque()
        self._next = 0
        self._notes: list[str] = []
        self._deaths = 0
        self._crashes: Counter[int] = Counter()
        self.bad: dict[int, str] = {}
        """Samples that cannot be used, with the reason for each."""

    def __iter__(self) -> Iterator[BufferedBatch]:
        return self

    def __next__(self) -> BufferedBatch:
        """The next batch; waits for it. Raises DataError if it cannot be had, with what was lost before as its notes."""
        try:
            self._prepare()
            done = self._finish()
            self._prepare()  # before the consumer goes off to train
        except DataError as error:
            for line in dict.fromkeys([*self._notes, *self.bad.values()]):
                error.add_note(line)
            raise
        return done

    def is_ready(self) -> bool:
        """Whether the next batch can be had without waiting."""
        if not self._pool or not self.config.workers:
            return False
        self._collect(0)
        return bool(self._pending) and not self._pending[0].tasks

    def close(self) -> None:
        """End the workers."""
        if self._pool:
            self._pool.close()
        self._pool = None

    def _finish(self) -> BufferedBatch:
        """Wait for the first batch in line, and take it."""
        while self._pending[0].tasks:
            self._collect(self.config.timeout)
        self._deaths = 0
        done = self._pending.popleft()
        done.notes += self._notes
        self._notes = []
        return done

    def _prepare(self) -> None:
        """Hand out work until enough batches are being made."""
        if self._pool is None:
            cropper = Cropper(self.reader, self.buffers, self.config, self.region)
            self._pool = WorkerPool(cropper, self.config.workers)
        while len(self._pending) < (self.config.prefetch if self.config.workers else 1):
            positions = batch_positions(self._next, self.batch_size, self.rank, self.world_size, self.start)
            self._next += 1
            # All ranks must agree on the size, so it is that of the first rank's first position.
            size = self.config.size_at(int(positions[0]) - self.rank * self.batch_size)
            batch = BufferedBatch(self.buffers.take(), size, positions, *self.order.at(positions))
            self._pending.append(batch)
            for row in np.flatnonzero(np.isin(batch.ids, list(self.bad))).tolist():
                self._replace_bad(batch, row)
            step = self._task_length()
            for first in range(0, self.batch_size, step):
                self._ask(batch, first, min(first + step, self.batch_size))

    def _task_length(self) -> int:
        """Samples in a task: two tasks for each worker in all batches ahead, and samples with all their views."""
        views = self.config.views
        share = -(-self.batch_size * self.config.prefetch // (2 * max(self.config.workers, 1)))
        return -(-min(max(share, _TASK[0]), _TASK[1]) // views) * views

    def _ask(self, batch: BufferedBatch, first: int, last: int) -> None:
        for name in ("ids", "epochs"):
            self.buffers.array(batch.buffer, name)[first:last] = getattr(batch, name)[first:last]
        batch.tasks += 1
        self._pool.submit(Task(batch.buffer, first, last, *batch.size))

    def _collect(self, timeout: float) -> None:
        done, deaths = self._pool.collect(timeout)
        if timeout and not done and not deaths and self.config.workers:
            at = [f"pid {pid} at {self.reader.location(s) if s >= 0 else 'nothing'}" for pid, s in self._pool.positions()]
            raise DataError(f"no data for {timeout:.0f} s; loader workers: {'; '.join(at)}. Is the file system gone?")
        of_buffer = {batch.buffer: batch for batch in self._pending}
        for task, bad, error in done:
            if error:
                raise error
            batch = of_buffer[task.buffer]
            batch.tasks -= 1
            for row, sample, reason in bad:
                self._mark_bad(sample, reason)
                if batch.ids[row] == sample:  # after a crash two tasks may have reported it
                    self._replace_bad(batch, row)
                    self._ask(batch, row, row + 1)
        if deaths:
            for death in deaths:
                self._note_death(death)
            self._pool.revive()

    def _mark_bad(self, sample: int, reason: str) -> None:
        """Remember that ``sample`` cannot be used. Raises DataError if too many cannot."""
        self.bad.setdefault(sample, f"{self.reader.name(sample)}: {reason}")
        count, total = len(self.bad), len(self.reader.index)
        if count > max(LOST_BEFORE_BUDGET, self.config.bad_budget * total) or count == total:
            raise DataError(
                f"{count} of {total} samples cannot be used, more than the budget of {self.config.bad_budget:.2%}; "
                f"the last: {self.bad[sample]}"
            )

    def _replace_bad(self, batch: BufferedBatch, row: int) -> None:
        """Put the next sample in order into row ``row`` while the one there is known to be bad."""
        while (sample := int(batch.ids[row])) in self.bad:
            if not batch.tried[row]:
                batch.replaced.append(self.bad[sample])
            batch.tried[row] += 1
            following = batch.positions[row : row + 1] + batch.tried[row] * self.config.views
            batch.ids[row : row + 1], batch.epochs[row : row + 1] = self.order.at(following)

    def _note_death(self, death: Death) -> None:
        """Note a worker's death, whose tasks are being done again; DataError if they keep dying."""
        where = f" at {self.reader.location(death.sample)}" if death.sample >= 0 else ""
        self._notes.append(f"loader worker {death.worker} (pid {death.pid}){where} {death.how}; another does its work again")
        if death.is_crash and death.sample >= 0:  # blamed on the sample, which the budget bounds
            self._crashes[death.sample] += 1
            if self._crashes[death.sample] >= MAX_CRASHES:
                self._mark_bad(death.sample, "crashes the process that decodes it")
                for batch in self._pending:
                    for row in np.flatnonzero(batch.ids == death.sample).tolist():
                        self._replace_bad(batch, row)
                        self._ask(batch, row, row + 1)
            return
        self._deaths += 1
        if self._deaths > MAX_DEATHS:
            fewer = self.config.workers // 2  # 0: in the training process
            raise DataError(
                f"{self._deaths} loader workers died while one batch was made; try --workers {fewer} instead of "
                f"{self.config.workers}, or look into the system's log; the last{where} {death.how}"
            )


def region_bytes(index: Index, config: LoaderConfig) -> int:
    """Bytes kept for the pixels of one sample: an image of 8:5 at the shards' size, and no less than an image of the batch."""
    resize = index.build.get("resize")
    side = resize if isinstance(resize, int) else _UNKNOWN_SIDE
    largest = max(height * width for height, width in config.all_sizes)
    return max(side * -(-8 * side // 5), largest) * config.channels
