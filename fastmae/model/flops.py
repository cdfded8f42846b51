"""FLOP of a training step by the model's definition, however it is computed: the numerator of MFU.

    forward  = matrix products and attention of encoder (visible tokens) and decoder (all tokens), 2 FLOP a multiply-add
    backward = twice the forward, less the gradient of the images, which is not needed

Shortcuts that skip work (``MAE.training_loss``) and recomputation that repeats it do not change the number, so that model
FLOP/s utilisation is comparable. Elementwise work is not counted. For ViT-B/16, L/16 and H/14 at mask ratio
0.75 this gives 58.5, 124.2 and 291.0 GFLOP an image. Source of the convention: Chowdhery et al. 2022 (arXiv 2204.02311),
appendix B.
"""

from fastmae.model.config import ModelConfig, kept_patches


def training_flops(config: ModelConfig, mask_ratio: float) -> int:
    """FLOP of one image's forward and backward pass."""
    L, K = config.patches, kept_patches(config.patches, mask_ratio)
    D, E, P = config.embed_dim, config.decoder_embed_dim, config.patch_values
    embedding = L * P * D
    encoder = config.depth * _block(1 + K, D, config.mlp_ratio)
    decoder = (1 + K) * D * E + config.decoder_depth * _block(1 + L, E, config.mlp_ratio) + (1 + L) * E * P
    return 2 * (2 * embedding + 3 * (encoder + decoder))


def _block(tokens: int, dim: int, mlp_ratio: float) -> int:
    """Multiply-adds of one block's forward pass."""
    hidden = int(dim * mlp_ratio)
    return tokens * (4 * dim * dim + 2 * dim * hidden + 2 * tokens * dim)
