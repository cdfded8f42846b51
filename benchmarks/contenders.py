"""Who is compared: the reference as its authors run it, its best honest rival, and fastmae, on equal weights and images.

(a) reference   the reference's arithmetic in eager mode; on a GPU fp16 autocast with a loss scaler, explicit attention,
                AdamW, and the wait for the device at each step that its loop has; on a CPU float32
(b) rival       the same arithmetic with what a careful user adds: bf16 autocast, torch's fused attention, fused AdamW,
                torch.compile on a GPU (on CPUs it is slower), no waiting
(c) fastmae     the trainer's own step: ``fastmae.train.step``
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

import fastmae.linear
from fastmae.benchmarks.reference import load_reference
from fastmae.benchmarks.twin import TwinMAE
from fastmae.config import ModelConfig
from fastmae.errors import InputError
from fastmae.mae import MAE
from fastmae.masking import Masking, random_masking
from fastmae.train.compiled import LossModule, compiled
from fastmae.train.graph import GraphedStep
from fastmae.train.memory import keep_freed_memory
from fastmae.train.optimizer import make_optimizer, parameter_groups
from fastmae.train.step import MicroBatch, Step

NAMES = ("reference", "rival", "fastmae")
MASK_RATIO, LR, WEIGHT_DECAY = 0.75, 1e-4, 0.05
_REFERENCE_NAMES = {"base": "mae_vit_base_patch16", "large": "mae_vit_large_patch16", "huge": "mae_vit_huge_patch14"}


@dataclass(frozen=True)
class Contender:
    """One way to train."""

    step: Callable[[], object]
    """A whole optimizer step."""
    loss: Callable[[Tensor, int], Tensor]
    """The loss of uint8 images under the noise of a seed, by the uncompiled model."""
    images: Tensor
    """Four uint8 images to compare ``loss`` on."""
    timed_loss: Callable[[int], Tensor]
    """The loss of the workload's images under the noise of a seed, by the callable and in the precision that ``step`` runs."""
    description: str


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What all of them train: a model and a batch of images on the device."""

    name: str
    """Preset: base, large, huge, or a smaller one."""
    config: ModelConfig
    batch: int
    device: torch.device
    clone: Path | None = None
    """A user's clone of facebookresearch/mae for (a) and (b); None: the plain twin."""

    def weights(self) -> dict[str, Tensor]:
        """The weights that every contender starts from."""
        torch.manual_seed(0)
        return MAE(self.config).state_dict()

    def images(self, batch: int | None = None) -> Tensor:
        """(B, C, H, W) uint8."""
        generator = torch.Generator().manual_seed(1)
        size = (batch or self.batch, self.config.in_chans, *self.config.img_size)
        return torch.randint(0, 256, size, dtype=torch.uint8, generator=generator).to(self.device)

    def normalised(self, images: Tensor) -> Tensor:
        """The same images as the reference's loader would leave them on the device: float32."""
        mean, std = (
            torch.tensor(v, device=self.device)[:, None, None] for v in (self.config.pixel_mean, self.config.pixel_std)
        )
        return (images / 255 - mean) / std


def make(contender: str, workload: Workload) -> Contender:
    """The contender of that name, one of ``NAMES``. Raises InputError if the clone cannot be used."""
    if contender == "fastmae":
        return fastmae_contender(workload)
    return _reference(workload) if contender == "reference" else _rival(workload)


def fastmae_contender(workload: Workload, *, config: ModelConfig | None = None, compile: str = "auto", graphs: bool = False,
                      kernels: str = "auto", step_class: type[Step] | None = None, onednn: bool = True,
                      keep_memory: bool = True, loss_module: type[LossModule] = LossModule,
                      as_bytes: bool = True) -> Contender:  # fmt: skip
    """(c), or with other arguments (c) with something switched off: the waterfall's. Changes the process that it runs in."""
    config = config or workload.config
    if workload.device.type == "cpu" and keep_memory:
        keep_freed_memory()  # as the trainer does
    if kernels != "auto":
        os.environ["FASTMAE_KERNELS"] = kernels
    if not onednn:
        fastmae.linear._by_onednn = lambda x: False
    model = MAE(config).to(workload.device)
    model.load_state_dict(workload.weights())
    optimizer = make_optimizer(model, WEIGHT_DECAY, (0.9, 0.95))
    autocast = torch.bfloat16 if workload.device.type == "cuda" else None
    kind = step_class or (GraphedStep if graphs else Step)
    if workload.clone:
        load_reference(workload.clone)  # so that all processes hold the same packages when their memory is compared
    module = compiled(loss_module(model), compile)
    step = kind(module, optimizer, patch_size=config.patch_size, mask_ratio=MASK_RATIO, seed=0, autocast=autocast)
    ids = torch.arange(workload.batch, device=workload.device)
    images = workload.images()
    batch = MicroBatch(images if as_bytes else workload.normalised(images), ids, torch.zeros_like(ids))

    def run() -> None:
        step([batch], LR)

    def masking(images: Tensor, seed: int) -> Masking:
        torch.manual_seed(seed)
        noise = torch.rand(len(images), config.patches, device=images.device)
        return random_masking(len(images), config.patches, MASK_RATIO, noise=noise)

    def timed_loss(seed: int) -> Tensor:
        with torch.autocast(workload.device.type, dtype=autocast, enabled=autocast is not None):
            return module(batch.images, *masking(batch.images, seed))

    def loss(images: Tensor, seed: int) -> Tensor:
        return model.training_loss(images, masking(images, seed))

    return Contender(run, loss, workload.images(4), timed_loss, "fastmae's training step")


def _reference(workload: Workload) -> Contender:
    model = _build(workload, fused=False)
    on_gpu = workload.device.type == "cuda"
    optimizer = torch.optim.AdamW(parameter_groups(model, WEIGHT_DECAY), lr=LR, betas=(0.9, 0.95))
    scaler = torch.amp.GradScaler(workload.device.type, enabled=on_gpu)
    images = workload.normalised(workload.images())
    torch.backends.cudnn.benchmark = True  # as its program sets it

    def forward() -> Tensor:
        with torch.autocast(workload.device.type, dtype=torch.float16, enabled=on_gpu):
            return model(images, mask_ratio=MASK_RATIO)[0]

    def step() -> None:
        loss = forward()
        loss.item()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if on_gpu:
            torch.cuda.synchronize()

    description = f"{_whose(workload)}, eager, explicit attention, AdamW"
    return Contender(step, _plain_loss(model, workload), workload.images(4), partial(_seeded, forward), description)


def _rival(workload: Workload) -> Contender:
    model = _build(workload, fused=True)
    on_gpu = workload.device.type == "cuda"
    optimizer = torch.optim.AdamW(parameter_groups(model, WEIGHT_DECAY), lr=LR, betas=(0.9, 0.95), fused=True)
    images = workload.normalised(workload.images())
    torch.backends.cudnn.benchmark = True
    run = torch.compile(model, dynamic=False) if on_gpu else model

    def forward() -> Tensor:
        with torch.autocast(workload.device.type, dtype=torch.bfloat16, enabled=on_gpu):
            return run(images, mask_ratio=MASK_RATIO)[0]

    def step() -> None:
        forward().backward()
        optimizer.step()
        optimizer.zero_grad()

    how = "bf16, SDPA, fused AdamW, torch.compile" if on_gpu else "SDPA, fused AdamW"
    return Contender(
        step, _plain_loss(model, workload), workload.images(4), partial(_seeded, forward), f"{_whose(workload)}, {how}"
    )


def _build(workload: Workload, fused: bool) -> nn.Module:
    if workload.clone is None:
        model = TwinMAE(workload.config, fused)
    else:
        module = load_reference(workload.clone)
        config = workload.config
        if config.img_size[0] != config.img_size[1]:
            raise InputError(f"the reference takes square images, got {config.img_size}")
        build = getattr(module, _REFERENCE_NAMES[workload.name])
        model = build(norm_pix_loss=config.norm_pix_loss, img_size=config.img_size[0])
        layers = [part for part in model.modules() if hasattr(part, "fused_attn")]  # timm's attention
        if not layers:
            raise InputError("this timm's attention has no fused_attn to switch; install timm 1.0 or newer")
        for layer in layers:
            layer.fused_attn = fused
    model.load_state_dict(workload.weights())
    return model.to(workload.device)


def _plain_loss(model: nn.Module, workload: Workload) -> Callable[[Tensor, int], Tensor]:
    def loss(images: Tensor, seed: int) -> Tensor:
        return _seeded(lambda: model(workload.normalised(images), mask_ratio=MASK_RATIO)[0], seed)

    return loss


def _seeded(forward: Callable[[], Tensor], seed: int) -> Tensor:
    torch.manual_seed(seed)  # the noise is the first thing that the call draws
    return forward()


def _whose(workload: Workload) -> str:
    return "plain twin of the reference" if workload.clone is None else "facebookresearch/mae"
