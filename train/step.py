"""One optimizer step: forward, backward, update. Nothing in it waits for the device.

An update whose gradients are not all finite is left out on the device itself (weights and moments keep their bits) and
counted; the trainer looks at the count at its log interval. The trainer and the benchmarks run this same step.
"""

import contextlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW

from fastmae.mae import MAE
from fastmae.masking import Masking, random_masking


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
    left_out: Tensor
    """Updates left out since the step was made, int64."""


class LossModule(nn.Module):
    """A model whose call is its training loss: the unit that is compiled and whose gradients are shared."""

    def __init__(self, model: MAE):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, ids_keep: Tensor, ids_predict: Tensor, ids_restore: Tensor) -> Tensor:
        """The loss of ``MAE.training_loss``; index tensors one by one, as compilers and DDP like them."""
        return self.model.training_loss(images, Masking(ids_keep, ids_predict, ids_restore))


_COMPILED = 64  # variants of one function that torch.compile keeps before it gives up
COMPILE = ("auto", "off", "blocks", "model")


def compiled(module: LossModule, how: str, processes: int = 1) -> nn.Module:
    """``module``, compiled as ``how`` says, one of ``COMPILE``, for a run of so many processes.

    ``model``: one graph of the whole loss, so that work fuses across blocks. ``blocks``: one small graph that all blocks of
    a kind share, compiled in seconds. ``auto``: ``off`` on CPUs, where torch's own kernels are faster; on GPUs ``model``, or
    ``blocks`` in a run of several processes, whose gradients are shared while earlier blocks still run backwards.
    """
    if how == "auto":
        on_gpu = module.model.cls_token.is_cuda
        how = "off" if not on_gpu else "model" if processes == 1 else "blocks"
    # Of every image size of a progressive run each kind of block is compiled once more, and all of them count together.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _COMPILED)
    if how == "blocks":
        for block in (*module.model.blocks, *module.model.decoder_blocks):
            block.compile(dynamic=False)
    return torch.compile(module, dynamic=False) if how == "model" else module


class Step:
    """The step of one process. ``module`` is a ``LossModule``, perhaps compiled, perhaps inside DDP."""

    def __init__(self, module: nn.Module, optimizer: AdamW, *, patch_size: int, mask_ratio: float, seed: int,
                 autocast: torch.dtype | None):  # fmt: skip
        self.module = module
        self.optimizer = optimizer
        self.patch_size, self.mask_ratio, self.seed = patch_size, mask_ratio, seed
        self.autocast = autocast
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.device = self.parameters[0].device
        self.skipped = torch.zeros((), dtype=torch.int64, device=self.device)
        self.left_out = torch.zeros_like(self.skipped)
        # A tensor on the device, so that a graph of the step can be run again at another learning rate.
        self.lr = torch.zeros((), device=self.device)

    def __call__(self, batches: Sequence[MicroBatch], lr: float) -> StepResult:
        """Accumulate the gradients of ``batches``, equal in size, and update at ``lr``."""
        self.lr.fill_(lr)
        return StepResult(*(t.clone() for t in self.run(batches)))

    def run(self, batches: Sequence[MicroBatch]) -> StepResult:
        """The step at the learning rate ``self.lr``. The result's counts go on counting in later steps."""
        loss = torch.zeros((), device=self.device)
        for number, batch in enumerate(batches):
            is_last = number == len(batches) - 1
            with contextlib.nullcontext() if is_last else self._no_sync():
                share = self._loss(batch) / len(batches)
                share.backward()
            loss += share.detach()
        grad_norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        self._update(grad_norm)
        return StepResult(loss, grad_norm, self.skipped, self.left_out)

    def _loss(self, batch: MicroBatch) -> Tensor:
        B, _, H, W = batch.images.shape
        patches = (H // self.patch_size) * (W // self.patch_size)
        masking = random_masking(B, patches, self.mask_ratio, seed=self.seed, sample_ids=batch.sample_ids, epoch=batch.epochs)
        with torch.autocast(batch.images.device.type, dtype=self.autocast, enabled=self.autocast is not None):
            return self.module(batch.images, *masking)

    def _update(self, grad_norm: Tensor) -> None:
        is_bad = ~torch.isfinite(grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr
        # The fused kernels of AdamW leave everything as it is where found_inf is 1: the way GradScaler skips a step.
        self.optimizer.found_inf = is_bad.float()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.skipped.add_(1).mul_(is_bad)
        self.left_out.add_(is_bad)

    def _no_sync(self) -> contextlib.AbstractContextManager:
        return self.module.no_sync() if isinstance(self.module, DistributedDataParallel) else contextlib.nullcontext()
