"""A training step of a model so small that it takes milliseconds."""

import torch

from fastmae import MAE, ModelConfig
from fastmae.train.step.loss_module import LossModule, MaskedLoss, compiled
from fastmae.train.step.optimizer import make_optimizer, parameter_groups
from fastmae.train.step.step import MicroBatch, Step

CONFIG = ModelConfig(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3, norm_pix_loss=True,
                     decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2)  # fmt: skip


def make_step(device="cpu", seed=0, kind=Step, compile="off", config=CONFIG, **options):
    torch.manual_seed(0)
    model = MAE(config).to(device)
    optimizer = make_optimizer(parameter_groups(model, 0.05), (0.9, 0.95))
    options = {"autocast": None, **options}
    loss = MaskedLoss(patch_size=config.patch_size, mask_ratio=0.75, seed=seed)
    return model, kind(compiled(LossModule(model), compile), optimizer, loss, **options)


def batch(n=8, device="cpu", epoch=0):
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return MicroBatch(images.to(device), torch.arange(n, device=device), torch.full((n,), epoch, device=device))


def weights(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}
