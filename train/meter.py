"""Loss and speed of a run between two readings."""

import time

import torch

from fastmae.train.parallel import World
from fastmae.train.step import StepResult


class Meter:
    """Loss and speed since the last reading. Losses stay on the device until they are read."""

    def __init__(self, world: World, effective_batch: int):
        self.world, self.effective_batch = world, effective_batch
        self._clear()

    def _clear(self) -> None:
        self.results = []
        self.waited = 0.0
        self.began = time.perf_counter()

    def add(self, result: StepResult) -> None:
        """Count one step."""
        self.results.append(result)

    def read(self) -> dict[str, float]:
        """Means since the last reading, which waits for the device, over all processes for the loss."""
        steps = len(self.results)
        # Of steps that were left out the loss says nothing; if all were, it is NaN, as it should be.
        loss = torch.stack([r.loss for r in self.results]).nanmean()
        values = {"loss": self.world.mean(loss).item(), "grad_norm": self.results[-1].grad_norm.item()}
        seconds = time.perf_counter() - self.began
        values |= {
            "images_per_second": steps * self.effective_batch / seconds,
            "seconds_per_step": seconds / steps,
            "data_wait": self.waited / seconds,
        }
        self._clear()
        return values
