"""A small model of plain or fused blocks, and what a pass of it gives."""

import torch

from fastmae import MAE
from fastmae.model.config import FUSED
from fastmae.model.masking import random_masking
from tests.support.models import make

ALL = ",".join(FUSED)
PLAIN = {"fused": "off", "attention": "math"}
OURS = {"fused": ALL, "attention": "short"}


def model_of(size=(32, 32), **fields) -> MAE:
    """A small model in float64 whose parameters all matter."""
    torch.manual_seed(0)
    return make(3, size, 8, **fields)


def pass_(model, call=None, low=None, images=3):
    """The loss of random images, and the gradients of all parameters by name; under autocast to ``low``."""
    (p, *_) = model.parameters()
    H, W = model.config.img_size
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(images, 3, H, W, generator=generator, dtype=torch.float64).to(p.device, p.dtype)
    masking = random_masking(images, model.config.patches, 0.6, seed=0, device=p.device)
    with torch.autocast(p.device.type, dtype=low, enabled=low is not None):
        loss = (call or model.training_loss)(pixels, masking)
    model.zero_grad()
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
