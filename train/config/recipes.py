"""Recipes: every setting that changes a run's result, as functions whose docstrings say what they come from.

The settings are those of He et al. 2021 (arXiv 2111.06377), appendix A.1 and table 8, as facebookresearch/mae runs them.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from fastmae.data.augment import Augment
from fastmae.errors import InputError
from fastmae.model.config import ModelConfig, kept_patches, preset
from fastmae.seeds import check_seed


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What changes the result of a pretraining run."""

    model: ModelConfig
    """The autoencoder."""
    mask_ratio: float = 0.75
    """Share of patches removed, strictly between 0 and 1."""
    epochs: float = 800
    """Visits to each sample; with several views, passes over the data times views."""
    steps: int | None = None
    """Optimizer steps; overrides ``epochs`` and keeps the share of warm-up."""
    warmup_epochs: float = 40
    """Epochs of linear warm-up from 0."""
    effective_batch: int = 4096
    """Images per optimizer step, over all processes and accumulated micro-batches."""
    blr: float = 1.5e-4
    """Base learning rate; the learning rate is ``blr * effective_batch / 256``."""
    min_lr: float = 0.0
    """Learning rate at the end of the half cosine."""
    weight_decay: float = 0.05
    """AdamW's, on everything but biases and one-dimensional parameters."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's."""
    augment: Augment = Augment()
    """Crop and flip."""
    views: int = 1
    """Crops of each decoded image, with a mask each; a pass over the data then counts as so many epochs. Less decoding, less
    variety in a batch (Hoffer et al. 2020, arXiv 1901.09335, study it for classifiers)."""
    shuffle_window: int | None = None
    """Shards mixed at a time, for disks that read in sequence; None mixes the samples of all shards."""
    progressive: tuple[tuple[float, tuple[int, int]], ...] = ()
    """Progressive resolution: (share of the run from which on, (height, width)), rising; the model's own size before."""
    seed: int = 0
    """Of initial weights, order, crops and masks."""

    def __post_init__(self):
        check_seed(self.seed)
        kept_patches(self.model.patches, self.mask_ratio)
        numbers = (self.epochs, self.warmup_epochs, self.blr, self.min_lr, self.weight_decay, *self.betas)
        if not all(math.isfinite(n) for n in numbers):
            raise InputError(f"epochs, warm-up, blr, min_lr, weight_decay and betas must be finite, got {numbers}")
        for name in ("epochs", "steps", "effective_batch", "blr"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise InputError(f"{name.replace('_', '-')} must be positive, got {value}")
        if not 0 <= self.warmup_epochs < self.epochs:
            raise InputError(f"warm-up must be shorter than the run, got {self.warmup_epochs} of {self.epochs} epochs")
        for name in ("min_lr", "weight_decay"):
            if getattr(self, name) < 0:
                raise InputError(f"{name.replace('_', '-')} must not be negative, got {getattr(self, name)}")
        if self.min_lr > self.lr:
            raise InputError(
                f"min_lr must not exceed the peak rate, blr x effective batch / 256 = {self.lr:g}, or the rate would rise "
                f"after the warm-up; got {self.min_lr:g}"
            )
        shares = [share for share, _ in self.progressive]
        if shares != sorted(set(shares)) or not all(0 <= share < 1 for share in shares):
            raise InputError(f"shares of a progressive run must rise inside [0, 1), got {shares}")
        for _, (height, width) in self.progressive:
            if height % self.model.patch_size or width % self.model.patch_size or min(height, width) < 1:
                raise InputError(f"image size {height} x {width} must be a multiple of the patch size {self.model.patch_size}")
            kept_patches(height * width // self.model.patch_size**2, self.mask_ratio)

    def sizes(self, total_steps: int) -> tuple[tuple[int, tuple[int, int]], ...]:
        """``progressive`` in samples of a run of ``total_steps``: (first position, (height, width))."""
        return tuple((round(share * total_steps) * self.effective_batch, size) for share, size in self.progressive)

    @property
    def lr(self) -> float:
        """The peak learning rate."""
        return self.blr * self.effective_batch / 256

    def total_steps(self, samples: int | None) -> int:
        """Optimizer steps of the run over ``samples`` per epoch. Raises InputError for a stream without ``steps``, and for a
        run whose every step would have the first one's rate, which is 0 under a warm-up."""
        if self.steps is None and samples is None:
            raise InputError("a stream without an index has no known epoch length: give --steps, or build indexed shards")
        steps = self.steps or math.ceil(self.epochs * samples / self.effective_batch)
        if steps == 1 and self.warmup_epochs > 0:
            raise InputError(
                "a run of 1 step under a warm-up trains at learning rate 0 and learns nothing; give more --steps or --epochs, "
                "or --warmup-epochs 0"
            )
        return steps


def reference_b() -> Recipe:
    """The reference's ViT-B/16 run: normalised pixels, 800 epochs, batch 4096; its loss ends near 0.42.

    ``torchrun --nproc-per-node 8 -m fastmae.train pretrain --recipe reference-b --data SHARDS --out RUN``
    """
    return Recipe(model=preset("base", norm_pix_loss=True))


def reference_l() -> Recipe:
    """The reference's ViT-L/16 run: as ``reference_b``; the reference reports 42 hours on 64 V100."""
    return replace(reference_b(), model=preset("large", norm_pix_loss=True))


def reference_h() -> Recipe:
    """The reference's ViT-H/14 run: as ``reference_b``, with patches of 14 pixels."""
    return replace(reference_b(), model=preset("huge", norm_pix_loss=True))


def paper_b() -> Recipe:
    """The paper's longest schedule, 1600 epochs, for ViT-B/16: 83.6 % top-1 after fine-tuning (table 3)."""
    return replace(reference_b(), epochs=1600)


def paper_l() -> Recipe:
    """The paper's longest schedule, 1600 epochs, for ViT-L/16: 85.9 % top-1 after fine-tuning (table 3)."""
    return replace(reference_l(), epochs=1600)


def paper_h() -> Recipe:
    """The paper's longest schedule, 1600 epochs, for ViT-H/14: 86.9 % top-1 after fine-tuning (table 3)."""
    return replace(reference_h(), epochs=1600)


RECIPES: dict[str, Callable[[], Recipe]] = {
    "reference-b": reference_b,
    "reference-l": reference_l,
    "reference-h": reference_h,
    "paper-b": paper_b,
    "paper-l": paper_l,
    "paper-h": paper_h,
}
