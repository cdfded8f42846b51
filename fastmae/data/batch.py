"""A batch, and how one is asked for: decoded images to uint8 crops, each a function of (seed, epoch, sample id) alone."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastmae.data.augment import DRAWS, Augment, crop_box, resized_crop
from fastmae.errors import InputError
from fastmae.kernels.philox import CROPS, uniform


class Batch(NamedTuple):
    """One rank's micro-batch."""

    images: Tensor
    """(B, C, H, W) uint8."""
    sample_ids: Tensor
    """(B,) int64: which samples, numbered by the index (streams: a hash of the key)."""
    epochs: Tensor
    """(B,) int64: in which epoch each of them stands."""
    labels: Tensor
    """(B,) int64, -1 without a label."""
    replaced: tuple[str, ...]
    """A line for each sample that could not be used."""


@dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """How batches are made."""

    # What changes the result.
    image_size: tuple[int, int] = (224, 224)
    """(height, width) in pixels."""
    channels: int = 3
    """3 for RGB, 1 for grey."""
    augment: Augment = Augment()
    """Crop and flip."""
    seed: int = 0
    """Of order and crops."""
    bad_budget: float = 0.001
    """Share of samples that may be replaced before the run stops; the first 16 always may."""

    # What only changes the speed.
    workers: int = 2
    """Processes per rank; 0 loads in the training process."""
    prefetch: int = 4
    """Batches that each worker prepares ahead."""
    pin_memory: bool = False
    """Page-locked batches, for copies to a GPU that do not wait."""

    def __post_init__(self):
        if self.channels not in (1, 3):
            raise InputError(f"images from files have 1 or 3 channels, the model asks for {self.channels}")
        if self.workers < 0 or self.prefetch < 1:
            raise InputError(f"workers must be >= 0 and prefetch >= 1, got {self.workers} and {self.prefetch}")


def crop_batch(images: list[np.ndarray], ids: np.ndarray, epochs: np.ndarray, config: LoaderConfig) -> Tensor:
    """Crops (B, C, H, W) uint8 of decoded images (H, W, C), each a function of (seed, epoch, sample id) alone."""
    draws = uniform(config.seed, CROPS, torch.from_numpy(epochs), torch.from_numpy(ids), DRAWS).numpy()
    out = torch.empty(len(images), config.channels, *config.image_size, dtype=torch.uint8)
    for i, (image, numbers) in enumerate(zip(images, draws, strict=True)):
        box = crop_box(numbers, *image.shape[:2], config.augment)
        out[i] = resized_crop(image, box, config.image_size, flip=config.augment.flip and numbers[0] < 0.5)
    return out
