"""Recipes: every setting that changes a run's result, as functions whose docstrings say what they come from.

The settings are those of He et al. 2021 (arXiv 2111.06377), appendix A.1 and table 8, as facebookresearch/mae runs them.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from fastmae.config import ModelConfig, preset
from fastmae.data.augment import Augment
from fastmae.errors import InputError
from fastmae.masking import kept_patches


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What changes the result of a pretraining run."""

    model: ModelConfig
    """The autoencoder."""
    mask_ratio: float = 0.75
    """Share of patches removed, strictly between 0 and 1."""
    epochs: float = 800
    """Passes over the data."""
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
    seed: int = 0
    """Of initial weights, order, crops and masks."""

    def __post_init__(self):
        kept_patches(self.model.patches, self.mask_ratio)
        numbers = (self.epochs, self.warmup_epochs, self.blr, self.min_lr, self.weight_decay, *self.betas)
        if not all(math.isfinite(n) for n in numbers):
            raise InputError(f"epochs, warm-up, blr, min_lr, weight_decay and betas must be finite, got {numbers}")
        if not self.epochs > 0 or (self.steps is not None and self.steps < 1) or self.effective_batch < 1:
            raise InputError(
                "epochs, steps and effective batch must be positive, "
                f"got {self.epochs}, {self.steps} and {self.effective_batch}"
            )
        if not 0 <= self.warmup_epochs < self.epochs:
            raise InputError(f"warm-up must be shorter than the run, got {self.warmup_epochs} of {self.epochs} epochs")
        if not self.blr > 0 or self.min_lr < 0 or self.weight_decay < 0:
            raise InputError(
                "blr must be positive, min_lr and weight_decay not negative, "
                f"got {self.blr}, {self.min_lr} and {self.weight_decay}"
            )

    @property
    def lr(self) -> float:
        """The peak learning rate."""
        return self.blr * self.effective_batch / 256

    def total_steps(self, samples: int | None) -> int:
        """Optimizer steps of the run over ``samples`` per epoch. Raises InputError for a stream without ``steps``."""
        if self.steps is not None:
            return self.steps
        if samples is None:
            raise InputError("a stream without an index has no known epoch length: give --steps, or build indexed shards")
        return math.ceil(self.epochs * samples / self.effective_batch)


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
