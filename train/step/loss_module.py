"""The unit that is trained: a model whose call is its loss, the micro-batch that it takes, and how torch.compile takes it."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastmae.model.mae import MAE
from fastmae.model.masking import Masking, random_masking

_COMPILED = 64  # variants of one function that torch.compile keeps before it gives up


class MicroBatch(NamedTuple):
    """What a step needs of a batch, on the device."""

    images: Tensor
    """(B, C, H, W) uint8."""
    sample_ids: Tensor
    """(B,) int64."""
    epochs: Tensor
    """(B,) int64."""


class LossModule(nn.Module):
    """A model whose call is its training loss: the unit that is compiled and parallelized."""

    def __init__(self, model: MAE):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, ids_keep: Tensor, ids_predict: Tensor, ids_restore: Tensor) -> Tensor:
        """The loss of ``MAE.training_loss``; index tensors one by one, as compilers and DDP like them."""
        return self.model.training_loss(images, Masking(ids_keep, ids_predict, ids_restore))


@dataclass(frozen=True, kw_only=True)
class MaskedLoss:
    """The pretraining loss of a micro-batch by a ``LossModule``, compiled and parallelized or not: each sample's mask follows
    from seed, epoch and sample id."""

    patch_size: int
    mask_ratio: float
    seed: int

    def __call__(self, module: nn.Module, batch: MicroBatch) -> Tensor:
        """The mean loss of ``batch``, a float32 scalar."""
        B, _, H, W = batch.images.shape
        patches = (H // self.patch_size) * (W // self.patch_size)
        masking = random_masking(B, patches, self.mask_ratio, seed=self.seed, sample_ids=batch.sample_ids, epoch=batch.epochs)
        return module(batch.images, *masking)


def compiled(module: LossModule, how: str, processes: int = 1) -> nn.Module:
    """``module``, compiled as ``how``, one of ``modes.COMPILE``, for a run of so many ranks.

    ``model``: one graph of the whole loss, so that work fuses across blocks. ``blocks``: one small graph that all blocks of
    a kind share, compiled in seconds. ``auto``: ``off`` on CPUs, where torch's own kernels are faster; on GPUs ``model``, or
    ``blocks`` in a run of several, whose gradients are reduced while earlier blocks still run backwards. ``model`` is one
    graph there too: its gradients come all at once, and are reduced when the backward pass has ended.
    """
    if how == "auto":
        on_gpu = module.model.cls_token.is_cuda
        how = "off" if not on_gpu else "model" if processes == 1 else "blocks"
    # Of every image size of a progressive run each kind of block is compiled once more, and all of them count together.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _COMPILED)
    if how != "off":
        torch._dynamo.config.optimize_ddp = False  # would split every graph at DDP's buckets
    if how == "blocks":
        for block in (*module.model.blocks, *module.model.decoder_blocks):
            block.compile(dynamic=False)
    return torch.compile(module, dynamic=False) if how == "model" else module
