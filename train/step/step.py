"""One optimizer step: forward, backward, update. Nothing in it waits for the device.

An update is left out on the device itself (weights and moments keep their bits) and counted if a loss or gradient of any
process is not finite; every process then leaves it out, because a loss that is not finite makes its gradients so, and those
are shared. The trainer looks at the count at its log interval. The trainer and the benchmarks run this same step.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from fastmae.model.masking import random_masking
from fastmae.train.step.loss_scale import LossScale
from fastmae.train.step.parallelize import gradients_stay, whole
from fastmae.train.step.spikes import SpikeDetector

_WARM_UPS = 2  # backward passes of a static graph after which DDP keeps its buckets (torch 2.13)


class MicroBatch(NamedTuple):
    """What a step needs of a batch, on the device."""

    images: Tensor
    """(B, C, H, W) uint8."""
    sample_ids: Tensor
    """(B,) int64."""
    epochs: Tensor
    """(B,) int64."""


class StepResult(NamedTuple):
    """Scalars on the device."""

    loss: Tensor
    """Mean over this process's images, float32."""
    grad_norm: Tensor
    """L2 norm of the gradient of all processes, float32."""
    skipped: Tensor
    """Updates left out on end up to this one, int64; 0 when this one was applied."""
    spike: Tensor
    """How far the loss lies above those before it, a robust z-score, float32; 0 without a ``SpikeDetector``."""


class Step:
    """The step of one process. ``module`` is a ``LossModule``, perhaps compiled, perhaps shared (``parallelize``).

    ``scale``: for fp16. ``spikes``: leaves out the updates of steps whose ``mean`` loss over all processes lies above its
    threshold.
    """

    def __init__(self, module: nn.Module, optimizer: AdamW, *, patch_size: int, mask_ratio: float, seed: int,
                 autocast: torch.dtype | None, scale: LossScale | None = None, spikes: SpikeDetector | None = None,
                 mean: Callable[[Tensor], Tensor] = lambda loss: loss):  # fmt: skip
        self.module = module
        self.optimizer = optimizer
        self.patch_size, self.mask_ratio, self.seed = patch_size, mask_ratio, seed
        self.autocast = autocast
        self.scale, self.spikes, self.mean = scale, spikes, mean
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.device = self.parameters[0].device
        self.skipped = torch.zeros((), dtype=torch.int64, device=self.device)
        # A tensor on the device, so that a graph of the step can be run again at another learning rate.
        self.lr = torch.zeros((), device=self.device)

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds of the step itself; loaded in place."""
        return {"skipped": self.skipped}

    def __call__(self, batches: Sequence[MicroBatch], lr: float) -> StepResult:
        """Accumulate the gradients of ``batches``, equal in size, and update at ``lr``."""
        self.lr.fill_(lr)
        return StepResult(*(t.clone() for t in self.run(batches)))

    def run(self, batches: Sequence[MicroBatch]) -> StepResult:
        """The step at the learning rate ``self.lr``. The result's counts go on counting in later steps."""
        loss = torch.zeros((), device=self.device)
        for number, batch in enumerate(batches):
            is_last = number == len(batches) - 1
            with contextlib.nullcontext() if is_last else gradients_stay(self.module):
                loss += self._backward(self.loss(batch) / len(batches))
        grad_norm = whole(torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None], foreach=True))
        if self.scale is not None:
            grad_norm = grad_norm / self.scale.value
        spike = torch.zeros_like(loss) if self.spikes is None else self.spikes.score(self.mean(loss))
        self._update(torch.isfinite(grad_norm), spike)
        return StepResult(loss, grad_norm, self.skipped, spike)

    def warm_up(self, batch: MicroBatch) -> None:
        """Run ``batch`` forward and backward and forget its gradients: what is compiled or settled at a first step is done
        then, DDP's buckets too, which else would add in another order in the first steps after a resume."""
        for _ in range(_WARM_UPS):
            self.loss(batch).backward()
        self.optimizer.zero_grad(set_to_none=True)

    def loss(self, batch: MicroBatch) -> Tensor:
        """The training loss of ``batch``, as the step computes it, under the masks of its samples."""
        B, _, H, W = batch.images.shape
        patches = (H // self.patch_size) * (W // self.patch_size)
        masking = random_masking(B, patches, self.mask_ratio, seed=self.seed, sample_ids=batch.sample_ids, epoch=batch.epochs)
        with torch.autocast(batch.images.device.type, dtype=self.autocast, enabled=self.autocast is not None):
            return self.module(batch.images, *masking)

    def _backward(self, loss: Tensor) -> Tensor:
        """Run the backward pass of ``loss``; return it without its graph."""
        factor = torch.ones_like(loss) if self.scale is None else self.scale.value
        (loss * torch.where(torch.isfinite(loss), factor, torch.nan)).backward()
        return loss.detach()

    def _update(self, is_finite: Tensor, spike: Tensor) -> None:
        is_left_out = ~is_finite if self.spikes is None else ~is_finite | (spike > self.spikes.threshold)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr
        # The fused kernels of AdamW leave everything as it is where found_inf is 1: the way GradScaler skips a step.
        self.optimizer.found_inf = is_left_out.float()
        if self.scale is not None:
            self.optimizer.grad_scale = self.scale.value
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.scale is not None:
            self.scale.update(~is_finite)
        self.skipped.add_(1).mul_(is_left_out)
