"""Loss and speed of a run between two readings."""

import resource
import time

import torch

from fastmae.devices import datasheet_flops
from fastmae.train.distributed.world import World
from fastmae.train.step.step import StepResult


class Meter:
    """Loss and speed since the last reading. Losses stay on the device until they are read."""

    def __init__(self, world: World, flops: float, effective_batch: int):
        """``flops``: of a training step, per image; of progressive runs that of the model's own size, in ``mfu`` too."""
        self.world, self.effective_batch = world, effective_batch
        peak = datasheet_flops(world.device)
        self.flops_share = peak and flops / (peak * world.size)
        self.clear()

    def clear(self) -> None:
        """Begin a reading."""
        self.results: list[StepResult] = []
        self.waited = 0.0
        self.began = time.perf_counter()

    def add(self, result: StepResult) -> None:
        """Count one step."""
        self.results.append(result)

    def read(self, is_first: bool = False) -> tuple[dict[str, float | None], list[StepResult]]:
        """Means since the last reading, which waits for the device, and the scalars of each step, on the CPU.

        ``is_first``: it was the first step of this process, which compiles and starts the workers: its seconds are no speed.
        """
        columns = (torch.stack(column).cpu() for column in zip(*self.results, strict=True))
        steps = [StepResult(*row) for row in zip(*columns, strict=True)]
        seconds = time.perf_counter() - self.began
        speed = len(steps) * self.effective_batch / seconds
        # A loss that is not a number is not counted; if none is one, the mean is NaN.
        values = {"loss": torch.stack([r.loss for r in steps]).nanmean().item(), "grad_norm": steps[-1].grad_norm.item()}
        if is_first:
            values |= {"first_step_seconds": seconds}
        else:
            values |= {"images_per_second": speed, "seconds_per_step": seconds / len(steps), "data_wait": self.waited / seconds,
                       "mfu": speed * self.flops_share if self.flops_share else None}  # fmt: skip
        values |= {"memory_bytes": _memory(self.world.device)}
        self.clear()
        return values, steps


def _memory(device: torch.device) -> int:
    """Most bytes that this process has held: of the GPU's, or of the machine's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
