"""AdamW over the reference's two parameter groups, and its learning-rate schedule.

lr(t) = peak t / warmup                                                        t < warmup
lr(t) = min + (peak - min) (1 + cos(pi (t - warmup) / (total - warmup))) / 2   else
"""

import math

from torch import Tensor, nn
from torch.optim import AdamW


def make_optimizer(groups: list[dict], betas: tuple[float, float]) -> AdamW:
    """Fused AdamW, eps 1e-8, over ``groups``. The learning rate is set at each step."""
    return AdamW(groups, lr=0.0, betas=betas, eps=1e-8, fused=True)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """The trained parameters as the reference groups them: first those that are not decayed (one-dimensional, or biases), then
    the rest. Class and mask token are three-dimensional and so decayed."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    plain = [p for name, p in trained if _is_plain(name, p)]
    decayed = [p for name, p in trained if not _is_plain(name, p)]
    return [{"params": plain, "weight_decay": 0.0}, {"params": decayed, "weight_decay": weight_decay}]


def _is_plain(name: str, parameter: Tensor) -> bool:
    return parameter.ndim == 1 or name.endswith(".bias")


def learning_rate(step: int, total: int, warmup: float, peak: float, minimum: float) -> float:
    """The learning rate of ``step`` (0 <= step < total); ``warmup`` in steps, possibly fractional."""
    if step < warmup:
        return peak * step / warmup
    return minimum + (peak - minimum) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))
