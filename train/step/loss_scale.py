"""The dynamic loss scale of fp16 training, kept on the device.

    scale <- scale / 2   after a gradient that is not finite        scale <- 2 scale   after 2000 consecutive finite ones

Powers of two, so that scaling costs no bit. torch's GradScaler decides for the tensors of its own rank; here one decision
for all, taken from the norm of the whole gradient, keeps sharded models together too. Source: Micikevicius et al. 2017
(arXiv 1710.03740), section 3.2, with GradScaler's numbers.
"""

import torch
from torch import Tensor

_FIRST = 2.0**16
_GROWTH_INTERVAL = 2000  # updates


class LossScale:
    """A scalar by which losses are multiplied before the backward pass."""

    def __init__(self, device: torch.device):
        self.value = torch.full((), _FIRST, device=device)
        self.good = torch.zeros((), dtype=torch.int32, device=device)
        """Consecutive finite gradients."""

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds of it; loaded in place."""
        return {"value": self.value, "good": self.good}

    def update(self, is_bad: Tensor) -> None:
        """Count a gradient, bool scalar on the device: finite, or not."""
        self.good.add_(1).mul_(~is_bad)
        grows = self.good == _GROWTH_INTERVAL
        self.value.mul_(torch.where(is_bad, 0.5, torch.where(grows, 2.0, 1.0)))
        self.good.mul_(~grows)
