"""What is counted: the loss of a training step by fastmae, by its best rival and by the reference, and its gradients.

    fastmae      ``LossModule(MAE)``, bf16 autocast, compiled, with its fused operations and its own attention kernel
    standard     the same without what is chosen by measurement: torch's operations, as torch.compile fuses them
    rival        the reference's arithmetic, bf16 autocast, torch's fused attention, compiled
    reference    the same arithmetic as its authors run it: fp16 autocast, explicit attention, eager

All of them on fake tensors, so that nothing is computed.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastmae.benchmarks.traffic.described import described, fake
from fastmae.benchmarks.traffic.gpus import GPU
from fastmae.benchmarks.traffic.kernel import Kernel
from fastmae.benchmarks.traffic.lower import compiled_kernels, eager_kernels
from fastmae.benchmarks.training.contenders import MASK_RATIO
from fastmae.benchmarks.training.twin import TwinMAE
from fastmae.model.config import ModelConfig, kept_patches
from fastmae.model.mae import MAE
from fastmae.train.step.loss_module import LossModule


@dataclass(frozen=True, kw_only=True)
class Step:
    """A step whose kernels are counted."""

    contender: str
    """One of ``CONTENDERS``."""
    name: str = ""
    """Of the preset."""
    config: ModelConfig
    """With fused operations and attention by name: nothing is measured."""
    batch: int
    gpu: GPU


def kernels_of(step: Step) -> list[Kernel]:
    """In the order of their launches. The process should do nothing else afterwards (``described``)."""
    with described(step.gpu):
        return kernels_here(step)


def kernels_here(step: Step) -> list[Kernel]:
    """The same inside ``described``."""
    loss, parameters = _LOSSES[step.contender](step.config, step.batch)
    return (eager_kernels if step.contender == "reference" else compiled_kernels)(loss, parameters)


def _fastmae(config: ModelConfig, batch: int) -> tuple[Callable[[], Tensor], list[Tensor]]:
    L, K = config.patches, kept_patches(config.patches, MASK_RATIO)
    module = _on_gpu(lambda: LossModule(MAE(config)))
    images = torch.empty(batch, config.in_chans, *config.img_size, dtype=torch.uint8, device="cuda")
    ids = [torch.empty(batch, n, dtype=torch.int32, device="cuda") for n in (K, L - K, L)]
    run = torch.compile(module, dynamic=False)

    def loss() -> Tensor:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            return run(images, *ids)

    return loss, _trained(module)


def _twin(config: ModelConfig, batch: int, *, fused: bool) -> tuple[Callable[[], Tensor], list[Tensor]]:
    module = _on_gpu(lambda: TwinMAE(config, fused=fused))
    images = torch.empty(batch, config.in_chans, *config.img_size, device="cuda")
    run = torch.compile(module, dynamic=False) if fused else module

    def loss() -> Tensor:
        with torch.autocast("cuda", dtype=torch.bfloat16 if fused else torch.float16):
            return run(images, mask_ratio=MASK_RATIO)[0]

    return loss, _trained(module)


def _rival(config: ModelConfig, batch: int) -> tuple[Callable[[], Tensor], list[Tensor]]:
    return _twin(config, batch, fused=True)


def _reference(config: ModelConfig, batch: int) -> tuple[Callable[[], Tensor], list[Tensor]]:
    return _twin(config, batch, fused=False)


def _on_gpu(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        module = build()
    return fake(module)


def _trained(module: nn.Module) -> list[Tensor]:
    return [p for p in module.parameters() if p.requires_grad]


_LOSSES = {"fastmae": _fastmae, "standard": _fastmae, "rival": _rival, "reference": _reference}
CONTENDERS = tuple(_LOSSES)
