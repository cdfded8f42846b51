"""Random resized crop and horizontal flip, drawn from numbers that are given, not from a generator's state.

A box covers a uniform share ``scale`` of the image's area at a log-uniform aspect ratio, ten tries, else the largest centred
box of an allowed ratio; ``resize`` and ``kernels/resized_crop.py`` crop it. Source: Szegedy et al. 2014 (arXiv 1409.4842),
section 6, with the limits of He et al. 2021 (arXiv 2111.06377), appendix A.1.
"""

import math
from dataclasses import dataclass

import numpy as np

from fastmae.errors import InputError

_TRIES = 10
DRAWS = 1 + 4 * _TRIES
"""Uniform numbers that one sample needs."""


@dataclass(frozen=True, kw_only=True)
class Augment:
    """What is drawn for each sample."""

    scale: tuple[float, float] = (0.2, 1.0)
    """Least and greatest share of the image's area."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Least and greatest width over height."""
    flip: bool = True
    """Mirror half of the samples left to right."""

    def __post_init__(self):
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise InputError(f"crop scale must be two rising numbers in (0, 1], got {self.scale}")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise InputError(f"crop ratio must be two rising positive numbers, got {self.ratio}")


def draw_crop(draws: np.ndarray, height: int, width: int, augment: Augment) -> tuple[tuple[int, int, int, int], bool]:
    """The box of ``crop_box`` and whether the crop is mirrored, from ``DRAWS`` numbers in [0, 1)."""
    return crop_box(draws, height, width, augment), augment.flip and bool(draws[0] < 0.5)


def crop_box(draws: np.ndarray, height: int, width: int, augment: Augment) -> tuple[int, int, int, int]:
    """A box (top, left, height, width) in pixels from ``draws[1:]``, numbers in [0, 1); see ``DRAWS``."""
    low, high = augment.scale
    log_low, log_high = math.log(augment.ratio[0]), math.log(augment.ratio[1])
    for share, aspect, y, x in draws[1:].reshape(_TRIES, 4).tolist():
        area = height * width * (low + (high - low) * share)
        ratio = math.exp(log_low + (log_high - log_low) * aspect)
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(y * (height - h + 1)), int(x * (width - w + 1)), h, w
    ratio = min(max(width / height, augment.ratio[0]), augment.ratio[1])
    w, h = min(width, round(height * ratio)), min(height, round(width / ratio))
    w, h = max(w, 1), max(h, 1)
    return (height - h) // 2, (width - w) // 2, h, w


def center_box(height: int, width: int, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """The largest centred box with the aspect ratio of ``size`` (height, width)."""
    ratio = size[1] / size[0]
    w, h = max(1, min(width, round(height * ratio))), max(1, min(height, round(width / ratio)))
    return (height - h) // 2, (width - w) // 2, h, w
