"""The memory of a training step on the CPU, worked out without running it.

    weights 4 P + gradients 4 P + moments 8 P + what the forward pass keeps for the backward pass + two of its largest tensors

P trained parameters. What is kept is counted on fake tensors (torch's ``FakeTensorMode``), which have shapes and no memory,
at two batch sizes; it grows in a straight line. An estimate: memory of libraries, loaders and fragmentation is not in it.
"""

import functools
from dataclasses import dataclass, replace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastmae.model.config import ModelConfig, kept_patches
from fastmae.model.mae import MAE
from fastmae.model.masking import Masking

_BATCHES = (2, 4)


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Bytes of a step: ``fixed + batch * per_image``."""

    fixed: int
    per_image: int
    parameters: int
    """Trained ones."""

    def needed(self, batch: int) -> int:
        """Bytes at ``batch`` images."""
        return self.fixed + batch * self.per_image

    def largest(self, available: int) -> int:
        """The largest batch that fits ``available`` bytes; 0 if none does."""
        return max(0, (available - self.fixed) // self.per_image)


@functools.cache
def estimate_step(config: ModelConfig, mask_ratio: float, autocast: torch.dtype | None) -> Estimate:
    """The estimate for a model that trains under ``autocast``, or without it."""
    with FakeTensorMode():
        # Which backend is fastest cannot be measured on fake tensors; all but math keep the same.
        model = MAE(replace(config, attention="sdpa"))
        small, large = (_kept_bytes(model, mask_ratio, autocast, batch) for batch in _BATCHES)
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    per_image = (large - small) // (_BATCHES[1] - _BATCHES[0])
    return Estimate(fixed=16 * parameters + small - _BATCHES[0] * per_image, per_image=per_image, parameters=parameters)


def _kept_bytes(model: MAE, mask_ratio: float, autocast: torch.dtype | None, batch: int) -> int:
    """Bytes kept for the backward pass of ``batch`` images, weights not among them, and twice the largest tensor."""
    config = model.config
    L = config.patches
    K = kept_patches(L, mask_ratio)
    images = torch.zeros(batch, config.in_chans, *config.img_size, dtype=torch.uint8)
    ids = torch.zeros(batch, L, dtype=torch.int32)
    masking = Masking(ids[:, :K].contiguous(), ids[:, K:].contiguous(), ids)
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage  # held, so that no other tensor gets its address
        return x

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x),
        torch.autocast("cpu", dtype=autocast, enabled=autocast is not None),
    ):
        model.training_loss(images, masking)
    sizes = [storage.nbytes() for storage in kept.values()]
    return sum(sizes) + 2 * max(sizes)
