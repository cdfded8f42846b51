"""A batch, and how one is asked for."""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from fastmae.data.augment import Augment
from fastmae.errors import InputError
from fastmae.seeds import check_seed


class Batch(NamedTuple):
    """One rank's micro-batch."""

    images: Tensor
    """(B, C, H, W) uint8."""
    sample_ids: Tensor
    """(B,) int64: which samples, numbered by the index (streams: a hash of the key)."""
    epochs: Tensor
    """(B,) int64: in which epoch each of them stands; views of one sample in one pass have an epoch each."""
    labels: Tensor
    """(B,) int64, -1 without a label."""
    replaced: tuple[str, ...] = ()
    """A line for each sample that could not be used."""
    notes: tuple[str, ...] = ()
    """A line for each worker that died and was replaced."""


CROP = ("auto", "cpu", "device")


@dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """How batches are made."""

    # What changes the result.
    image_size: tuple[int, int] = (224, 224)
    """(height, width) in pixels."""
    sizes: tuple[tuple[int, tuple[int, int]], ...] = ()
    """Progressive resolution: (position in the run from which on, (height, width)), positions rising; ``image_size`` before."""
    channels: int = 3
    """3 for RGB, 1 for grey."""
    augment: Augment = Augment()
    """Crop and flip."""
    views: int = 1
    """Crops of each decoded image: it stands so many times in a row in the order, and a pass over the data counts as so many
    epochs. Less work per crop, less variety in a batch."""
    shuffle_window: int | None = None
    """Shards that are read at a time, in random order, their samples mixed; None mixes all samples of all shards."""
    crop: str = "auto"
    """Where crops are resized: cpu, device, or auto: the device if that is a GPU. They differ by rounding."""
    seed: int = 0
    """Of order and crops."""
    bad_budget: float = 0.001
    """Share of the data set's samples (streams: of those seen) that may be bad before the run stops; 16 always may."""

    # What only changes the speed, or what may be read.
    workers: int = 2
    """Processes per rank; 0 loads in the training process."""
    prefetch: int = 4
    """Batches prepared ahead."""
    timeout: float = 600.0
    """Seconds without any progress after which waiting for data is an error."""
    allow_pipe: bool = False
    """Whether ``pipe:`` URLs, which run shell commands, are streamed."""

    def __post_init__(self):
        check_seed(self.seed)
        if self.channels not in (1, 3):
            raise InputError(f"images from files have 1 or 3 channels, the model asks for {self.channels}")
        if self.workers < 0 or self.prefetch < 1:
            raise InputError(f"workers must be >= 0 and prefetch >= 1, got {self.workers} and {self.prefetch}")
        if self.views < 1 or (self.shuffle_window is not None and self.shuffle_window < 1):
            raise InputError(f"views and the shuffle window must be >= 1, got {self.views} and {self.shuffle_window}")
        if not 0 <= self.bad_budget <= 1:
            raise InputError(f"the budget of bad samples must lie in 0..1, got {self.bad_budget}")
        if self.crop not in CROP:
            raise InputError(f"crop must be one of {', '.join(CROP)}, got {self.crop!r}")
        starts = [start for start, _ in self.sizes]
        if starts != sorted(set(starts)) or any(min(size) < 1 for size in self.all_sizes):
            raise InputError(
                f"image sizes must be positive and their first positions rise, got {self.image_size}, {self.sizes}"
            )

    @property
    def all_sizes(self) -> list[tuple[int, int]]:
        """Every (height, width) that batches may have."""
        return [self.image_size, *(size for _, size in self.sizes)]

    def size_at(self, position: int) -> tuple[int, int]:
        """(height, width) of the images of a batch that begins at ``position`` of the run."""
        return next((size for start, size in reversed(self.sizes) if position >= start), self.image_size)
