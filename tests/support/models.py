"""A small model in float64, with random weights everywhere."""

import torch

from fastmae import MAE, ModelConfig

WIDTHS = {"embed_dim": 24, "depth": 2, "num_heads": 3, "decoder_embed_dim": 16, "decoder_depth": 2, "decoder_num_heads": 4}


def make(in_chans, img_size, patch_size, norm_pix=True, **more) -> MAE:
    """A small model of these images in float64; ``more``: other fields of its config."""
    config = {**WIDTHS, "in_chans": in_chans, "img_size": img_size, "patch_size": patch_size, "norm_pix_loss": norm_pix, **more}
    model = MAE(ModelConfig(**config)).double()
    with torch.no_grad():  # weights at random everywhere, so that no gradient is zero by symmetry
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.1)
    return model
