"""Equal work: what must hold before any time is taken."""

import torch

FP32_TOLERANCE, LOW_TOLERANCE = 1e-5, 1e-2  # relative difference of losses, in float32 and in the precision that is timed


class LossesDiffer(Exception):
    """Contenders do not do the same work, so their times mean nothing."""


def check_losses(found: dict[str, tuple[float, float]], device: torch.device) -> None:
    """Raise LossesDiffer unless all losses, (float32, as timed), are the first contender's within the tolerances."""
    exact, timed = next(iter(found.values()))
    tolerance = LOW_TOLERANCE if device.type == "cuda" else FP32_TOLERANCE
    for name, (own_exact, own_timed) in found.items():
        if not abs(own_exact - exact) <= FP32_TOLERANCE * exact:
            raise LossesDiffer(f"{name} computes another loss, {own_exact}, not {exact}")
        if not abs(own_timed - timed) <= tolerance * timed:
            raise LossesDiffer(f"{name} trains on another loss, {own_timed}, not {timed}")
