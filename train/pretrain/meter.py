"""Loss and speed of a run between two readings."""

import resource
import time

import torch

from fastmae.devices import datasheet_flops
from fastmae.model.config import ModelConfig
from fastmae.model.flops import training_flops
from fastmae.train.distributed.world import World
from fastmae.train.step.step import StepResult


class Meter:
    """Loss and speed since the last reading. Losses stay on the device until they are read."""

    def __init__(self, world: World, config: ModelConfig, mask_ratio: float, effective_batch: int):
        self.world, self.effective_batch = world, effective_batch
        peak = datasheet_flops(world.device)
        # Of progressive runs, too, the utilisation counts images of the model's own size.
        self.flops_share = peak and training_flops(config, mask_ratio) / (peak * world.size)
        self._clear()

    def _clear(self) -> None:
        self.results: list[StepResult] = []
        self.waited = 0.0
        self.began = time.perf_counter()

    def add(self, result: StepResult) -> None:
        """Count one step."""
        self.results.append(result)

    def read(self) -> tuple[dict[str, float | None], list[StepResult]]:
        """Means since the last reading, which waits for the device, and each step's scalars on the CPU, with the loss of all
        processes."""
        losses = self.world.mean(torch.stack([r.loss for r in self.results]))
        columns = [losses, *(torch.stack(column) for column in list(zip(*self.results, strict=True))[1:])]
        steps = [StepResult(*row) for row in zip(*(column.cpu() for column in columns), strict=True)]
        seconds = time.perf_counter() - self.began
        speed = len(steps) * self.effective_batch / seconds
        values = {
            # Of steps that were left out the loss says nothing; if all were, it is NaN, as it should be.
            "loss": losses.nanmean().item(),
            "grad_norm": steps[-1].grad_norm.item(),
            "images_per_second": speed,
            "seconds_per_step": seconds / len(steps),
            "data_wait": self.waited / seconds,
            "mfu": speed * self.flops_share if self.flops_share else None,
            "memory_bytes": _memory(self.world.device),
        }
        self._clear()
        return values, steps


def _memory(device: torch.device) -> int:
    """Most bytes that this process has held: of the GPU's, or of the machine's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
