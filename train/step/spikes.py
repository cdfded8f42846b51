"""Loss spikes: losses far above the recent ones.

    z = (loss - median) / (1.4826 median|losses - median|)        over the last 128 steps

Median and median deviation, because the spikes themselves stand among the recent losses; 1.4826 makes the deviation that of a
normal distribution. Source: Iglewicz and Hoaglin 1993, "How to Detect and Handle Outliers", on robust z-scores.
"""

import torch
from torch import Tensor

_WINDOW = 128  # steps
_FEWEST = 32  # losses that must be known before one is called a spike
_FLOOR = 1e-6  # of the median: a loss that does not change at all has no deviation


class SpikeDetector:
    """Scores each loss against those before it. Its state lives on ``device``, and nothing in it waits for that."""

    def __init__(self, threshold: float, device: torch.device):
        self.threshold = threshold
        self.losses = torch.full((_WINDOW,), torch.nan, device=device)
        self.count = torch.zeros((), dtype=torch.int64, device=device)

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds of it; loaded in place."""
        return {"losses": self.losses, "count": self.count}

    def score(self, loss: Tensor) -> Tensor:
        """z of ``loss``, a float32 scalar on the device, which is then remembered; 0 while too few are known, or if it is not
        finite."""
        median = _median(self.losses)
        deviation = 1.4826 * _median((self.losses - median).abs()) + _FLOOR * median.abs()
        is_finite = torch.isfinite(loss)
        z = torch.where(is_finite & (self.count >= _FEWEST), (loss - median) / deviation, 0.0)
        place = (self.count % _WINDOW).view(1)
        self.losses.index_copy_(0, place, torch.where(is_finite, loss, self.losses[place][0]).view(1))
        self.count.add_(is_finite)
        return z


def _median(x: Tensor) -> Tensor:
    """The lower median of the numbers in ``x``, NaN if there are none. torch's ``nanmedian`` has no deterministic kernel on
    GPUs, and without a dim some versions of it wait for the device."""
    last = (x.isnan().logical_not().sum() - 1).clamp(min=0)
    return x.sort().values.index_select(0, (last // 2).view(1)).squeeze(0)  # NaN is sorted last
