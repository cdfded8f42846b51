"""Which sample comes next: a pure function of (seed, position), the same for any world size, worker count or batch size.

Position t of a run lies in epoch t // n at place t % n of that epoch's permutation of the n samples. Epochs follow each
other without a gap, so a batch may span two of them and there is no tail: every sample comes exactly once per epoch.
"""

import numpy as np

from fastmae.kernels.philox import ORDER, permutation


class Order:
    """The endless order of ``samples`` samples under ``seed``."""

    def __init__(self, samples: int, seed: int):
        self.samples = samples
        self.seed = seed
        self._epochs: dict[int, np.ndarray] = {}

    def at(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Sample ids and epochs, int64, at ``positions`` (B,) int64 >= 0."""
        epochs, places = np.divmod(positions, self.samples)
        ids = np.empty_like(positions)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            ids[here] = self._epoch(int(epoch))[places[here]]
        return ids, epochs

    def _epoch(self, epoch: int) -> np.ndarray:
        if epoch not in self._epochs:
            kept = {e: o for e, o in self._epochs.items() if e == epoch - 1}  # a batch spans two epochs; older are done
            self._epochs = {**kept, epoch: permutation(self.seed, ORDER, epoch, self.samples).numpy()}
        return self._epochs[epoch]


def batch_positions(micro_batch: int, batch_size: int, rank: int, world_size: int, start: int) -> np.ndarray:
    """Positions (batch_size,) of rank's ``micro_batch``-th batch of a run that began at position ``start``.

    Micro-batch m takes the next world_size * batch_size positions, rank r their r-th slice: a step's samples depend only
    on its position and size, not on how they are split over ranks and accumulation.
    """
    first = start + (micro_batch * world_size + rank) * batch_size
    return np.arange(first, first + batch_size, dtype=np.int64)
