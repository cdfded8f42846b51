"""Which patches are visible and which are predicted: index tensors in place of a boolean mask.

    ids_shuffle = argsort(noise);           ids_restore = argsort(ids_shuffle)
    ids_keep = ids_shuffle[:K];             ids_predict = ids_shuffle[K:K+Q]

L patches per image, K = int(L (1 - mask_ratio)) kept, Q predicted (L - K, or fewer). The noise is a pure function of
(seed, epoch, sample id), the same on any device, world size and worker count.
Source: He et al. 2021 (arXiv 2111.06377), section 3 "Masking".
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastmae.errors import InputError
from fastmae.kernels import random_masking as random_ids
from fastmae.model.config import kept_patches
from fastmae.seeds import check_seed


class Masking(NamedTuple):
    """Patch indices of a batch, int32, row-major over the grid."""

    ids_keep: Tensor
    """(B, K): the visible patches, in the encoder's order."""
    ids_predict: Tensor
    """(B, Q): the patches to predict, in the order of the prediction's rows."""
    ids_restore: Tensor
    """(B, L): the position of each patch in the shuffled order; below K means visible."""


def random_masking(
    batch: int,
    patches: int,
    mask_ratio: float,
    *,
    seed: int | None = None,
    sample_ids: Tensor | None = None,
    epoch: int | Tensor = 0,
    noise: Tensor | None = None,
    num_predict: int | None = None,
    device: torch.device | str | None = None,
) -> Masking:
    """A random masking of ``batch`` images of ``patches`` patches.

    With ``seed``: the noise of (seed, ``epoch``, ``sample_ids``), where ``sample_ids`` (B,) int64 defaults to
    0, 1, ... and ``epoch`` is an int or (B,). With ``noise`` (B, L): that noise, smallest kept. With neither: a
    draw from torch's generator. ``num_predict``: Q, if fewer than all masked patches are to be predicted. ``device``
    defaults to that of ``sample_ids`` or ``noise``. Raises InputError on a ratio that keeps nothing or everything, and on a
    seed of more than 64 bits.
    """
    K = kept_patches(patches, mask_ratio)
    Q = patches - K if num_predict is None else num_predict
    if not 0 < Q <= patches - K:
        raise InputError(f"num_predict must lie in 1..{patches - K}, the masked patches, got {Q}")
    if noise is not None:
        if noise.shape != (batch, patches):
            raise InputError(f"noise must be {(batch, patches)}, got {tuple(noise.shape)}")
        noise = noise.to(device or noise.device)
    elif seed is not None:
        seed = check_seed(seed)
        sample_ids = (torch.arange(batch) if sample_ids is None else sample_ids).to(device=device, dtype=torch.int64)
        if sample_ids.shape != (batch,):
            raise InputError(f"sample_ids must be {(batch,)}, one an image, got {tuple(sample_ids.shape)}")
        if isinstance(epoch, Tensor):
            epochs = epoch.to(device=sample_ids.device, dtype=torch.int64).expand(batch)
        else:
            epochs = torch.full_like(sample_ids, epoch)
        return Masking(*random_ids(seed, epochs, sample_ids, patches, K, Q))
    else:
        noise = torch.rand(batch, patches, device=device)
    ids_shuffle = torch.argsort(noise, dim=1, stable=True)
    order = torch.arange(patches, device=ids_shuffle.device).expand(batch, patches)
    ids_restore = torch.empty_like(ids_shuffle).scatter_(1, ids_shuffle, order)
    ids_shuffle = ids_shuffle.to(torch.int32)
    return Masking(ids_shuffle[:, :K].contiguous(), ids_shuffle[:, K : K + Q].contiguous(), ids_restore.to(torch.int32))
