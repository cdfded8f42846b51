"""One optimizer step: forward, backward, update. Nothing in it waits for the device.

An update is skipped on the device itself (weights and moments stay bitwise the same) and counted if a loss or gradient of any
rank is not finite, or, if asked for, if the loss spikes. All ranks skip together: a loss that is not finite makes its gradients
so, gradients are reduced over all ranks, and what is scored is the mean loss of all ranks. The trainer reads the count at its
log interval. The trainer and the benchmarks run this same step.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from fastmae.train.step.loss_module import MicroBatch
from fastmae.train.step.loss_scale import LossScale
from fastmae.train.step.parallelize import full, no_reduction
from fastmae.train.step.spikes import SpikeDetector

_WARM_UPS = 2  # backward passes of a static graph after which DDP keeps its buckets (torch 2.13)


class StepResult(NamedTuple):
    """Scalars on the device."""

    loss: Tensor
    """Mean over the images of all ranks, float32."""
    grad_norm: Tensor
    """L2 norm of the gradient of all ranks, float32."""
    skipped: Tensor
    """Consecutive updates skipped up to this one, int64; 0 when this one was applied."""
    spike: Tensor
    """How far the loss lies above those before it, a robust z-score (``SpikeDetector``), float32."""


class Step:
    """The step of one rank.

    ``module``: what is trained, perhaps compiled and parallelized. ``loss``: the training loss of a micro-batch by ``module``,
    called under autocast to ``autocast``, None without. ``scale``: for fp16. ``mean``: the mean of a scalar over all ranks.
    ``spike_z``: z-score from which on a loss is a spike, whose update is skipped if ``skip_spikes``.
    """

    def __init__(self, module: nn.Module, optimizer: AdamW, loss: Callable[[nn.Module, MicroBatch], Tensor], *,
                 autocast: torch.dtype | None, scale: LossScale | None = None,
                 mean: Callable[[Tensor], Tensor] = lambda loss: loss, spike_z: float = 8.0,
                 skip_spikes: bool = False):  # fmt: skip
        self.module, self.optimizer, self.autocast, self.scale, self.mean = module, optimizer, autocast, scale, mean
        self.skip_spikes = skip_spikes
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.device = self.parameters[0].device
        self.spikes = SpikeDetector(spike_z, self.device)
        self.skipped = torch.zeros((), dtype=torch.int64, device=self.device)
        # A tensor on the device, so that a graph of the step can be run again at another learning rate. On GPUs fused AdamW
        # reads float32 alone; on CPUs a float64 model gets a rate as exact as its weights.
        is_exact = self.device.type == "cpu" and self.parameters[0].dtype == torch.float64
        self.lr = torch.zeros((), dtype=torch.float64 if is_exact else torch.float32, device=self.device)
        self._loss = loss

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds of the step itself; loaded in place."""
        return {"skipped": self.skipped}

    def __call__(self, batches: Sequence[MicroBatch], lr: float) -> StepResult:
        """Accumulate the gradients of ``batches``, equal in size, and update at ``lr``."""
        self.lr.fill_(lr)
        return StepResult(*(t.clone() for t in self.run(batches)))

    def run(self, batches: Sequence[MicroBatch]) -> StepResult:
        """The step at the learning rate ``self.lr``. The result's count changes with later steps."""
        loss = torch.zeros((), device=self.device)
        for number, batch in enumerate(batches):
            is_last = number == len(batches) - 1
            with contextlib.nullcontext() if is_last else no_reduction(self.module):
                loss += self._backward(self.loss(batch) / len(batches))
        grad_norm = full(torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None], foreach=True))
        if self.scale is not None:
            grad_norm = grad_norm / self.scale.value
        loss = self.mean(loss)
        spike = self.spikes.score(loss)
        self._update(torch.isfinite(grad_norm), spike)
        return StepResult(loss, grad_norm, self.skipped, spike)

    def warm_up(self, batch: MicroBatch) -> None:
        """Run ``batch`` forward and backward and drop its gradients: what a first step compiles is compiled then, and DDP makes
        its final buckets, which else would add in another order in the first steps after a resume."""
        for _ in range(_WARM_UPS):
            self.loss(batch).backward()
        self.optimizer.zero_grad(set_to_none=True)

    def loss(self, batch: MicroBatch) -> Tensor:
        """The training loss of ``batch`` on this rank, as the step computes it."""
        with torch.autocast(batch.images.device.type, dtype=self.autocast, enabled=self.autocast is not None):
            return self._loss(self.module, batch)

    def _backward(self, loss: Tensor) -> Tensor:
        """Run the backward pass of ``loss``; return it without its graph."""
        factor = torch.ones_like(loss) if self.scale is None else self.scale.value
        (loss * torch.where(torch.isfinite(loss), factor, torch.nan)).backward()
        return loss.detach()

    def _update(self, is_finite: Tensor, spike: Tensor) -> None:
        is_skipped = ~is_finite | (spike > self.spikes.threshold) if self.skip_spikes else ~is_finite
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr
        # AdamW's fused kernels change nothing where found_inf is 1: the way in which GradScaler skips a step.
        self.optimizer.found_inf = is_skipped.float()
        if self.scale is not None:
            self.optimizer.grad_scale = self.scale.value
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.scale is not None:
            self.scale.update(~is_finite)
        self.skipped.add_(1).mul_(is_skipped)
