"""Which sample comes next: a pure function of (seed, position), the same for any world size, worker count or batch size.

Pass e over the n samples is a permutation of them; passes follow each other without a gap, so a batch may span two of them and
there is no tail: every sample comes exactly once per pass. With V views, each sample takes V positions in a row, and pass e
counts as the epochs e V ... e V + V - 1: a view is drawn as if it were a visit in an epoch of its own.
"""

from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from fastmae.kernels.philox import ORDER, WINDOWS, permutation, random_words

_LARGE = 100_000  # samples, from which on the next pass is shuffled beside the present one


class Order:
    """The endless order of ``samples`` samples under ``seed``.

    ``window``: shards to be read at a time, and ``shard_of`` (samples,) the shard of each sample: shards come in random
    order, and samples are mixed inside each group of ``window`` of them. None mixes all.
    """

    def __init__(self, samples: int, seed: int, *, views: int = 1, window: int | None = None,
                 shard_of: np.ndarray | None = None):  # fmt: skip
        self.samples, self.seed, self.views, self.window = samples, seed, views, window
        self.shard_of = None if window is None else np.asarray(shard_of, np.int64)
        self._passes: dict[int, np.ndarray] = {}
        self._thread = ThreadPoolExecutor(1) if samples >= _LARGE else None
        self._ahead: dict[int, Future[np.ndarray]] = {}

    def at(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Sample ids and epochs, int64, at ``positions`` (B,) int64 >= 0."""
        visits, views = np.divmod(positions, self.views)
        passes, places = np.divmod(visits, self.samples)
        ids = np.empty_like(positions)
        for number in np.unique(passes):
            here = passes == number
            ids[here] = self._pass(int(number))[places[here]]
        return ids, passes * self.views + views

    def _pass(self, number: int) -> np.ndarray:
        if number not in self._passes:
            kept = {n: o for n, o in self._passes.items() if n == number - 1}  # a batch spans two passes; older are done
            ahead = self._ahead.pop(number, None)
            self._passes = {**kept, number: ahead.result() if ahead else self._permutation(number)}
            if self._thread:  # a large pass takes a second or more, which the training process must not wait for
                self._ahead = {number + 1: self._thread.submit(self._permutation, number + 1)}
        return self._passes[number]

    def _permutation(self, number: int) -> np.ndarray:
        if self.window is None:
            return permutation(self.seed, ORDER, number, self.samples).numpy()
        shards = permutation(self.seed, WINDOWS, number, int(self.shard_of.max()) + 1).numpy()
        group = np.empty(len(shards), np.int64)
        group[shards] = np.arange(len(shards)) // self.window
        keys = random_words(self.seed, ORDER, number, torch.arange(self.samples), 1)[:, 0].numpy()
        return np.lexsort((np.arange(self.samples), keys, group[self.shard_of]))


def batch_positions(micro_batch: int, batch_size: int, rank: int, world_size: int, start: int) -> np.ndarray:
    """Positions (batch_size,) of rank's ``micro_batch``-th batch of a run that began at position ``start``.

    Micro-batch m takes the next world_size * batch_size positions, rank r their r-th slice: a step's samples depend only
    on its position and size, not on how they are split over ranks and accumulation.
    """
    first = start + (micro_batch * world_size + rank) * batch_size
    return np.arange(first, first + batch_size, dtype=np.int64)
