"""The training step of a library's own loop: eager, with torch's fused attention, on the workload that all contenders share."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from fastmae.benchmarks.training.contenders import LR, WEIGHT_DECAY, Contender, Workload
from fastmae.benchmarks.training.reference import Draw
from fastmae.errors import InputError
from fastmae.train.step.optimizer import parameter_groups

EPS = 1e-6  # the reference's, of LayerNorm
NORM = partial(nn.LayerNorm, eps=EPS)

Loss = Callable[[Tensor], Tensor]
"""Of normalised images."""


def eager(workload: Workload, model: nn.Module, loss: Loss, draw: Draw, description: str, *, fused: bool,
           is_scaled: bool = False, compared: Callable[[Tensor, int], Tensor] | None = None) -> Contender:  # fmt: skip
    """``model`` trained by a loop of its library's kind: under bf16 autocast on a GPU or, ``is_scaled``, as by the reference's
    loop: fp16 (by ``loss`` itself), a loss scaler, the gradients' norm and a wait for the device.

    ``loss`` draws its noise by ``draw``; ``compared`` is the contender's ``loss`` where it is another.
    """
    model.to(workload.device).train()
    on_gpu = workload.device.type == "cuda"
    optimizer = torch.optim.AdamW(parameter_groups(model, WEIGHT_DECAY), lr=LR, betas=(0.9, 0.95), fused=fused)
    scaler = torch.amp.GradScaler(workload.device.type, enabled=on_gpu and is_scaled)
    images, noise = workload.normalised(workload.images()), workload.noise()
    torch.backends.cudnn.benchmark = True

    def forward() -> Tensor:
        draw.noise = noise
        with torch.autocast(workload.device.type, dtype=torch.bfloat16, enabled=on_gpu and not is_scaled):
            return loss(images)

    def step() -> None:
        found = forward()
        if is_scaled:
            found.item()
        scaler.scale(found).backward()
        if is_scaled:
            scaler.unscale_(optimizer)
            torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if is_scaled and on_gpu:
            torch.cuda.synchronize()

    def plain(images: Tensor, seed: int) -> Tensor:
        draw.noise = None
        torch.manual_seed(seed)  # the noise is the first thing that the call draws
        return loss(workload.normalised(images))

    how = "eager, SDPA, fused AdamW" if fused else "eager, SDPA, AdamW"
    how = f"{'fp16' if is_scaled else 'bf16'}, {how}" if on_gpu else how
    return Contender(step, compared or plain, workload.images(4), forward, f"{description}; {how}")


def load(model: nn.Module, weights: dict[str, Tensor], whose: str) -> None:
    """Raise InputError unless ``weights`` are exactly those of ``model``."""
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        text = " ".join(str(error).split())[:300]
        raise InputError(f"{whose} has other parameters than the versions that are known: {text}") from error
