"""The unit that is trained: a model whose call is its loss, and how torch.compile takes it."""

import torch
from torch import Tensor, nn

from fastmae.model.mae import MAE
from fastmae.model.masking import Masking

_COMPILED = 64  # variants of one function that torch.compile keeps before it gives up


class LossModule(nn.Module):
    """A model whose call is its training loss: the unit that is compiled and whose gradients are shared."""

    def __init__(self, model: MAE):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, ids_keep: Tensor, ids_predict: Tensor, ids_restore: Tensor) -> Tensor:
        """The loss of ``MAE.training_loss``; index tensors one by one, as compilers and DDP like them."""
        return self.model.training_loss(images, Masking(ids_keep, ids_predict, ids_restore))


def compiled(module: LossModule, how: str, processes: int = 1) -> nn.Module:
    """``module``, compiled as ``how`` says, one of ``run.COMPILE``, for a run of so many processes.

    ``model``: one graph of the whole loss, so that work fuses across blocks. ``blocks``: one small graph that all blocks of
    a kind share, compiled in seconds. ``auto``: ``off`` on CPUs, where torch's own kernels are faster; on GPUs ``model``, or
    ``blocks`` in a run of several processes, whose gradients are shared while earlier blocks still run backwards. ``model`` is
    one graph there too: its gradients come all at once, and are shared when the backward pass has ended.
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
