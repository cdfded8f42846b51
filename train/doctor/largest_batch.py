"""The largest batch whose training step fits the GPU: found by trying it, forward, backward and update, uncompiled.

Not included: memory of NCCL and DDP (about 1 GB), and batches that the loader prefetches to the GPU.
"""

import gc
from collections.abc import Callable
from dataclasses import dataclass

import torch

from fastmae.model.config import ModelConfig
from fastmae.model.mae import MAE
from fastmae.train.pretrain.out_of_memory import is_out_of_memory
from fastmae.train.step.loss_module import LossModule, MaskedLoss
from fastmae.train.step.optimizer import make_optimizer, parameter_groups
from fastmae.train.step.step import MicroBatch, Step

MOST = 8192  # images; no GPU needs larger batches
_STEPS = 2  # the first one makes the moments, the second is like all others
_PRECISION = 16  # the answer is at most a sixteenth too small


@dataclass(frozen=True, kw_only=True)
class Found:
    """The largest batch that fits."""

    largest: int
    """Images; 0 if not even one fits."""
    peak: int
    """Bytes that torch has allocated for the largest batch that fits."""


def largest_batch(fits: Callable[[int], bool], asked: int, most: int = MOST) -> int:
    """The largest batch that ``fits``, searched from ``asked`` on, to a sixteenth; 0 if not even 1 does."""
    low, high = 0, most + 1
    batch = min(asked, most)
    while low < most:
        if fits(batch):
            low = batch
        else:
            high = batch
        if high - low <= max(1, low // _PRECISION):
            break
        if high > most:
            batch = min(2 * low, most)
        elif low == 0:
            batch = max(1, high // 2)
        else:
            batch = (low + high) // 2
    return low


def try_batches(config: ModelConfig, mask_ratio: float, autocast: torch.dtype | None, device: torch.device,
                asked: int) -> Found:  # fmt: skip
    """The largest batch of a step on ``device``, a GPU. Memory is freed afterwards."""
    trial = None
    try:
        trial = _Trial(config, mask_ratio, autocast, device)
        largest = largest_batch(trial.fits, asked)
        return Found(largest=largest, peak=trial.peaks.get(largest, 0))
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return Found(largest=0, peak=0)  # the model alone is too large
    finally:
        del trial
        _give_back()


class _Trial:
    """A model and its step, tried with batches of random images."""

    def __init__(self, config: ModelConfig, mask_ratio: float, autocast: torch.dtype | None, device: torch.device):
        self.config, self.device = config, device
        self.peaks: dict[int, int] = {}
        model = MAE(config).to(device)
        optimizer = make_optimizer(parameter_groups(model, 0.05), (0.9, 0.95))
        self.step = Step(LossModule(model), optimizer, MaskedLoss(patch_size=config.patch_size, mask_ratio=mask_ratio, seed=0),
                         autocast=autocast)  # fmt: skip

    def fits(self, batch: int) -> bool:
        """Whether steps of ``batch`` images fit."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        try:
            self._run(batch)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            is_good = False
        else:
            is_good = True
        # Outside the handler: the error's traceback holds the tensors of the step.
        self.step.optimizer.zero_grad(set_to_none=True)
        if not is_good:
            _give_back()
        elif self.device.type == "cuda":
            self.peaks[batch] = torch.cuda.max_memory_allocated(self.device)
        return is_good

    def _run(self, batch: int) -> None:
        ids = torch.arange(batch, device=self.device)
        shape = (batch, self.config.in_chans, *self.config.img_size)
        images = torch.randint(0, 256, shape, dtype=torch.uint8, device=self.device)
        for _ in range(_STEPS):
            self.step([MicroBatch(images, ids, torch.zeros_like(ids))], 0.0)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _give_back() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
