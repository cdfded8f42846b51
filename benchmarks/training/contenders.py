"""What is compared: the reference as its authors run it, its best honest rival, and fastmae, on equal weights and images.

(a) reference   the reference's arithmetic in eager mode; on a GPU fp16 autocast with a loss scaler, explicit attention,
                AdamW, and its loop's wait for the device at each step; on a CPU float32
(b) rival       the same arithmetic with what a careful user adds: bf16 autocast, torch's fused attention, fused AdamW,
                torch.compile on a GPU (on CPUs it is slower), no waiting
(c) fastmae     the trainer's own step: ``fastmae.train.step.step``

All of them train under the same masks: those that (c) derives from sample ids. (a) and (b) draw and sort noise of their own
for it, as the reference does, and the noise that they sort is one whose order gives those masks.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

import fastmae.model.block.linear
from fastmae.benchmarks.training.reference import Draw, build_reference, load_reference
from fastmae.benchmarks.training.twin import TwinMAE
from fastmae.model.attention.choice import fastest_alone
from fastmae.model.attention.dot_product import MEASURED
from fastmae.model.block.choice import block_shapes, residual_of
from fastmae.model.block.measured import BlockTask, adopt_block, choose_block
from fastmae.model.block.trial import Variant, attention_of
from fastmae.model.config import ModelConfig, kept_patches
from fastmae.model.mae import MAE
from fastmae.model.masking import random_masking
from fastmae.train.step.allocator import keep_freed_memory
from fastmae.train.step.cuda_graph import GraphedStep
from fastmae.train.step.loss_module import LossModule, MaskedLoss, compiled
from fastmae.train.step.optimizer import make_optimizer, parameter_groups
from fastmae.train.step.step import MicroBatch, Step

NAMES = ("reference", "rival", "fastmae")
MASK_RATIO, LR, WEIGHT_DECAY = 0.75, 1e-4, 0.05


@dataclass(frozen=True)
class Contender:
    """One way to train."""

    step: Callable[[], object]
    """A full optimizer step."""
    loss: Callable[[Tensor, int], Tensor]
    """The loss of uint8 images under the noise of a seed, by the uncompiled model."""
    images: Tensor
    """Four uint8 images to compare ``loss`` on."""
    timed_loss: Callable[[], Tensor]
    """The loss of the workload's images under the masks of ``step``, by the callable and in the precision that it runs."""
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
    crossmae: Path | None = None
    """A user's clone of TonyLianLong/CrossMAE, for the peer of that name."""
    compile: str = "auto"
    """What torch.compile compiles of (b) and (c) on a GPU: the full model (auto) or single blocks."""

    def weights(self) -> dict[str, Tensor]:
        """The weights that every contender starts from."""
        torch.manual_seed(0)
        return MAE(self.config).state_dict()

    def images(self, batch: int | None = None) -> Tensor:
        """(B, C, H, W) uint8."""
        generator = torch.Generator().manual_seed(1)
        size = (batch or self.batch, self.config.in_chans, *self.config.img_size)
        return torch.randint(0, 256, size, dtype=torch.uint8, generator=generator).to(self.device)

    def batch_of(self, images: Tensor) -> MicroBatch:
        """What (c) trains on."""
        ids = torch.arange(len(images), device=self.device)
        return MicroBatch(images, ids, torch.zeros_like(ids))

    def noise(self) -> Tensor:
        """(B, L): sorted, it gives the masks of ``batch_of``."""
        batch = self.batch_of(self.images())
        masking = random_masking(self.batch, self.config.patches, MASK_RATIO, seed=0, sample_ids=batch.sample_ids,
                                 epoch=batch.epochs)  # fmt: skip
        return masking.ids_restore.float()

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


def choose(config: ModelConfig, device: torch.device, compile: str = "auto", without: tuple[str, ...] = ()) -> str:
    """On a GPU, choose attention and what blocks fuse as the trainer does for a run in bf16: measured once, and kept on disk.
    Returns them in words.

    ``without``: operations of ``config.FUSED``, or ``short`` attention, that this process then does not use all the same.
    """
    if device.type not in MEASURED or config.fused != "auto":
        return f"attention {config.attention}, fused {config.fused}"
    K, found = kept_patches(config.patches, MASK_RATIO), []
    for shape in block_shapes(config, K, config.patches - K):
        residual = residual_of(config, torch.bfloat16)
        task = BlockTask(device.type, torch.bfloat16, residual, shape, config.attention, compile != "off")
        attention, fused = choose_block(task).best
        if attention in without:
            attention = fastest_alone(device.type, task.dtype, attention_of(shape))
        found.append(Variant(attention, tuple(name for name in fused if name not in without)))
        adopt_block(task, found[-1])
    return " or ".join(dict.fromkeys(map(str, found)))


def fastmae_contender(workload: Workload, *, config: ModelConfig | None = None, compile: str | None = None,
                      graphs: bool = False, kernels_off: tuple[str, ...] = (), not_chosen: tuple[str, ...] = (),
                      step_class: type[Step] | None = None,
                      onednn: bool = True, keep_memory: bool = True, loss_module: type[LossModule] = LossModule,
                      as_bytes: bool = True) -> Contender:  # fmt: skip
    """(c), or with other arguments the variants of the waterfall. Changes the process that it runs in."""
    config = config or workload.config
    chosen = choose(config, workload.device, compile or workload.compile, not_chosen)
    if workload.device.type == "cpu" and keep_memory:
        keep_freed_memory()  # as the trainer does
    for name in kernels_off:  # ops ask at each call: the compiled graph stays what it is
        importlib.import_module(f"fastmae.kernels.{name}").use_triton = lambda x: False
    if not onednn:
        fastmae.model.block.linear._by_onednn = lambda x: False
    model = MAE(config).to(workload.device)
    model.load_state_dict(workload.weights())
    optimizer = make_optimizer(parameter_groups(model, WEIGHT_DECAY), (0.9, 0.95))
    autocast = torch.bfloat16 if workload.device.type == "cuda" else None
    kind = step_class or (GraphedStep if graphs else Step)
    if workload.clone:
        load_reference(workload.clone)  # so that all processes hold the same packages when their memory is compared
    module = compiled(loss_module(model), compile or (workload.compile if autocast else "auto"))
    step = kind(module, optimizer, MaskedLoss(patch_size=config.patch_size, mask_ratio=MASK_RATIO, seed=0), autocast=autocast)
    images = workload.images()
    batch = workload.batch_of(images if as_bytes else workload.normalised(images))

    def run() -> None:
        step([batch], LR)

    def loss(images: Tensor, seed: int) -> Tensor:
        torch.manual_seed(seed)
        noise = torch.rand(len(images), config.patches, device=images.device)
        return model.training_loss(images, random_masking(len(images), config.patches, MASK_RATIO, noise=noise))

    return Contender(run, loss, workload.images(4), partial(step.loss, batch),
                     f"fastmae's training step, {chosen}")  # fmt: skip


def _reference(workload: Workload) -> Contender:
    model, draw = _build(workload, fused=False)
    on_gpu = workload.device.type == "cuda"
    optimizer = torch.optim.AdamW(parameter_groups(model, WEIGHT_DECAY), lr=LR, betas=(0.9, 0.95))
    scaler = torch.amp.GradScaler(workload.device.type, enabled=on_gpu)
    images, noise = workload.normalised(workload.images()), workload.noise()
    torch.backends.cudnn.benchmark = True  # as its program sets it

    def forward() -> Tensor:
        draw.noise = noise
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
    return Contender(step, _plain_loss(model, draw, workload), workload.images(4), forward, description)


def _rival(workload: Workload) -> Contender:
    model, draw = _build(workload, fused=True)
    on_gpu = workload.device.type == "cuda"
    optimizer = torch.optim.AdamW(parameter_groups(model, WEIGHT_DECAY), lr=LR, betas=(0.9, 0.95), fused=True)
    images, noise = workload.normalised(workload.images()), workload.noise()
    torch.backends.cudnn.benchmark = True
    run = _compiled(model, workload.compile) if on_gpu else model

    def forward() -> Tensor:
        draw.noise = noise
        with torch.autocast(workload.device.type, dtype=torch.bfloat16, enabled=on_gpu):
            return run(images, mask_ratio=MASK_RATIO)[0]

    def step() -> None:
        forward().backward()
        optimizer.step()
        optimizer.zero_grad()

    unit = " of single blocks" if workload.compile == "blocks" else ""
    how = f"bf16, SDPA, fused AdamW, torch.compile{unit}" if on_gpu else "SDPA, fused AdamW"
    return Contender(step, _plain_loss(model, draw, workload), workload.images(4), forward, f"{_whose(workload)}, {how}")


def _compiled(model: nn.Module, how: str) -> nn.Module:
    if how != "blocks":
        return torch.compile(model, dynamic=False)
    for block in (*model.blocks, *model.decoder_blocks):
        block.compile(dynamic=False)
    return model


def _build(workload: Workload, fused: bool) -> tuple[nn.Module, Draw]:
    """The reference's arithmetic, and what draws its noise."""
    draw = Draw()
    if workload.clone is None:
        model = TwinMAE(workload.config, fused, draw)
    else:
        model = build_reference(load_reference(workload.clone, draw), workload.config, fused)
    model.load_state_dict(workload.weights())
    return model.to(workload.device), draw


def _plain_loss(model: nn.Module, draw: Draw, workload: Workload) -> Callable[[Tensor, int], Tensor]:
    def loss(images: Tensor, seed: int) -> Tensor:
        draw.noise = None
        torch.manual_seed(seed)  # the noise is the first thing that the call draws
        return model(workload.normalised(images), mask_ratio=MASK_RATIO)[0]

    return loss


def _whose(workload: Workload) -> str:
    return "plain twin of the reference" if workload.clone is None else "facebookresearch/mae"
