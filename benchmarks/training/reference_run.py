"""``reference-run``: a small run of the reference and one of fastmae, loss by loss.

    deviation(t) = |fastmae(t) - reference(t)| / reference(t),      wanted in float64: deviation(t) <= 1e-8 at every step t

Both start from the same weights and train on the same photographs under the same masks, through AdamW and the whole schedule,
warm-up included: fastmae by the trainer's own step, the reference by a plain loop around its ``models_mae`` and its
``util/lr_sched`` (its own engine needs torch below 2, timm 0.3.2 and a GPU). Without a clone of it, the plain twin and the
schedule as the paper states it take their place. In lower precision rounding parts the curves: the largest deviation is stated,
beside how far either curve is from the float64 one. Source: He et al. 2021 (arXiv 2111.06377), appendix A.1.
"""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from fastmae.benchmarks.training.photographs import photographs
from fastmae.benchmarks.training.reference import Draw, build_reference, load_reference, load_schedule
from fastmae.benchmarks.training.twin import TwinMAE
from fastmae.model.config import ModelConfig
from fastmae.model.mae import MAE
from fastmae.model.masking import random_masking
from fastmae.train.step.loss_module import LossModule, MaskedLoss, MicroBatch
from fastmae.train.step.optimizer import learning_rate, make_optimizer, parameter_groups
from fastmae.train.step.step import Step

LIMIT = 1e-8
MASK_RATIO, WEIGHT_DECAY, BETAS, SEED = 0.75, 0.05, (0.9, 0.95), 0
PRECISIONS = {  # name -> (dtype of the weights, what autocast computes in)
    "float64": (torch.float64, None),
    "float32": (torch.float32, None),
    "bf16 autocast": (torch.float32, torch.bfloat16),
}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What both train on."""

    config: ModelConfig = ModelConfig(img_size=64, patch_size=8, embed_dim=96, depth=4, num_heads=3, decoder_embed_dim=64,
                                      decoder_depth=2, decoder_num_heads=4, norm_pix_loss=True)  # fmt: skip
    """The model."""
    steps: int = 300
    """Updates."""
    batch: int = 32
    """Images of an update."""
    accumulate: int = 1
    """Micro-batches of an update, a divisor of ``batch``."""
    epoch_steps: int = 15
    """Updates of an epoch: every image once, under a mask of its own."""
    warmup: float = 0.1
    """Share of the updates in which the learning rate rises."""
    peak: float = 1e-3
    """Largest learning rate."""
    minimum: float = 1e-5
    """Learning rate at the end."""
    device: torch.device = torch.device("cpu")
    """Where both run."""

    @property
    def images(self) -> int:
        """Images of an epoch."""
        return self.batch * self.epoch_steps

    def weights(self) -> dict[str, Tensor]:
        """The weights that both start from, float32."""
        torch.manual_seed(SEED)
        return MAE(self.config).state_dict()

    def micro_batches(self, images: Tensor, step: int) -> list[MicroBatch]:
        """Those of an update, of ``images`` (N, C, H, W) uint8."""
        places = torch.arange(step * self.batch, (step + 1) * self.batch, device=images.device)
        ids, epochs = places % len(images), places // len(images)
        parts = (t.chunk(self.accumulate) for t in (images[ids], ids, epochs))
        return [MicroBatch(*part) for part in zip(*parts, strict=True)]


def measure_run(plan: Plan, clone: Path | None = None, data: Path | None = None) -> dict[str, object]:
    """The section ``reference run``: a row with both curves for each precision; in ``wrong`` a line if float64's differ.

    ``clone``: of facebookresearch/mae; None: the plain twin. ``data``: a folder of shards; None: photographs that come with
    scikit-image and scikit-learn. Raises InputError if one of them cannot be used.
    """
    images, source = photographs(MAE(plan.config), plan.images, data)
    images = images.to(plan.device)
    names = [name for name, (_, autocast) in PRECISIONS.items() if autocast is None or plan.device.type == "cuda"]
    curves = {}
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for name in names:
            curves[name] = {"reference": reference_losses(plan, images, name, clone), "fastmae": our_losses(plan, images, name)}
    rows = [_row(name, curves[name], curves["float64"]) for name in names]
    whose = "the plain twin of the reference" if clone is None else "facebookresearch/mae"
    notes = [f"{plan.steps} updates of {plan.batch} images against {whose}, on {source}"]
    if clone is None:
        notes.append("--reference CLONE compares with the reference itself")
    if plan.device.type == "cuda":
        notes.append("the learning rate is rounded to float32 in both, as fused AdamW takes it on GPUs")
    wrong = [f"float64: the loss deviates by {r['largest']:.2g} at update {r['at']}, allowed {LIMIT:g}"
             for r in rows if r["precision"] == "float64" and not r["largest"] <= LIMIT]  # fmt: skip
    numbers = {f.name: getattr(plan, f.name) for f in dataclasses.fields(plan) if f.name not in ("config", "device")}
    return {"against": whose, "images_from": source, "model": plan.config.architecture, **numbers, "limit": LIMIT, "rows": rows,
            "wrong": wrong, "notes": notes}  # fmt: skip


def our_losses(plan: Plan, images: Tensor, precision: str) -> list[float]:
    """The loss of each update of the trainer's step, not rounded to its result's float32."""
    dtype, autocast = PRECISIONS[precision]
    model = MAE(plan.config)
    model.load_state_dict(plan.weights())
    model.to(plan.device, dtype)
    masked = MaskedLoss(patch_size=plan.config.patch_size, mask_ratio=MASK_RATIO, seed=SEED)
    losses: list[Tensor] = []

    def loss(module: nn.Module, batch: MicroBatch) -> Tensor:
        losses.append(masked(module, batch))
        return losses[-1]

    step = Step(LossModule(model), make_optimizer(parameter_groups(model, WEIGHT_DECAY), BETAS), loss, autocast=autocast)
    for t in range(plan.steps):
        step(plan.micro_batches(images, t), learning_rate(t, plan.steps, plan.warmup * plan.steps, plan.peak, plan.minimum))
        losses[-plan.accumulate :] = [sum(x.detach().double() for x in losses[-plan.accumulate :]) / plan.accumulate]
    return torch.stack(losses).tolist()


def reference_losses(plan: Plan, images: Tensor, precision: str, clone: Path | None = None) -> list[float]:
    """The loss of each update of a plain loop around the clone's model and schedule, or around the twin."""
    dtype, autocast = PRECISIONS[precision]
    config, draw = plan.config, Draw()
    model = TwinMAE(config, rand=draw) if clone is None else build_reference(load_reference(clone, draw), config, fused=False)
    model.load_state_dict(plan.weights())
    model.to(plan.device, dtype)
    adjust = _adjust_learning_rate if clone is None else load_schedule(clone)
    epochs = plan.steps / plan.epoch_steps
    schedule = SimpleNamespace(lr=plan.peak, min_lr=plan.minimum, warmup_epochs=plan.warmup * epochs, epochs=epochs)
    optimizer = torch.optim.AdamW(_groups(model), lr=plan.peak, betas=BETAS)
    mean, std = (torch.tensor(v, device=plan.device)[:, None, None] for v in (config.pixel_mean, config.pixel_std))
    losses = []
    for t in range(plan.steps):
        adjust(optimizer, t / plan.epoch_steps, schedule)
        if plan.device.type == "cuda":
            for group in optimizer.param_groups:
                group["lr"] = torch.tensor(group["lr"]).item()
        total = 0.0
        for batch in plan.micro_batches(images, t):
            masking = random_masking(len(batch.images), config.patches, MASK_RATIO, seed=SEED, sample_ids=batch.sample_ids,
                                     epoch=batch.epochs)  # fmt: skip
            draw.noise = masking.ids_restore.float()  # sorted, it gives these masks
            pixels = ((batch.images / 255 - mean) / std).to(dtype)  # float32 first, as its loader's
            with torch.autocast(plan.device.type, dtype=autocast, enabled=autocast is not None):
                loss = model(pixels, mask_ratio=MASK_RATIO)[0]
            (loss / plan.accumulate).backward()
            total += loss.item() / plan.accumulate
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


def _groups(model: nn.Module) -> list[dict]:
    """The reference's two: biases and all else of one dimension without weight decay, and the rest with it, tokens included."""
    plain, decayed = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (plain if parameter.ndim == 1 or name.endswith(".bias") else decayed).append(parameter)
    return [{"params": plain, "weight_decay": 0.0}, {"params": decayed, "weight_decay": WEIGHT_DECAY}]


def _adjust_learning_rate(optimizer: torch.optim.Optimizer, epoch: float, schedule: SimpleNamespace) -> None:
    """Warm-up from 0, then half a cosine down to ``min_lr``; ``epoch`` is fractional."""
    progress = (epoch - schedule.warmup_epochs) / (schedule.epochs - schedule.warmup_epochs)
    height = epoch / schedule.warmup_epochs if progress < 0 else math.cos(math.pi * progress / 2) ** 2
    least = 0.0 if progress < 0 else schedule.min_lr
    for group in optimizer.param_groups:
        group["lr"] = least + (schedule.lr - least) * height


def deviations(found: list[float], expected: list[float]) -> list[float]:
    """Of each loss, relative; infinite where one is not a number."""
    relative = (abs(a - b) / b for a, b in zip(found, expected, strict=True))
    return [d if math.isfinite(d) else math.inf for d in relative]


def _row(name: str, curves: dict[str, list[float]], exact: dict[str, list[float]]) -> dict[str, object]:
    found = deviations(curves["fastmae"], curves["reference"])
    own = {f"{who}_error": max(deviations(curve, exact["reference"])) for who, curve in curves.items()}
    return {"precision": name, "largest": max(found), "at": found.index(max(found)), **own, "losses": curves}


def table(section: dict) -> list[list[str]]:
    """The section's table: deviations are relative, ``error`` is the largest from the reference's float64 curve."""
    lines = [["precision", "updates", "first loss", "last loss", "largest deviation", "at update", "reference's error",
              "fastmae's error"]]  # fmt: skip
    for r in section["rows"]:
        curve = r["losses"]["fastmae"]
        lines.append([r["precision"], str(len(curve)), f"{curve[0]:.6f}", f"{curve[-1]:.6f}", f"{r['largest']:.1e}",
                      str(r["at"]), f"{r['reference_error']:.1e}", f"{r['fastmae_error']:.1e}"])  # fmt: skip
    return lines
