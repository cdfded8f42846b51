"""An independent masked autoencoder in plain PyTorch, with the reference's arithmetic, call and parameter names.

What the benchmarks compare with when no clone of facebookresearch/mae is given. Written from the paper (arXiv 2111.06377) and
from what the reference computes, without its code; tests (``test_twin.py``, ``test_reference.py``) show that loss and gradients
are equal. It does what the reference does, shortcuts included: all patches embedded, a strided convolution,
gathers for the shuffle, the decoder on all tokens, the target of every patch stored.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmae.model.config import ModelConfig

_EPS = 1e-6  # of LayerNorm, and of a patch's variance


class TwinAttention(nn.Module):
    """Multi-head self-attention, step by step or through torch's fused one."""

    def __init__(self, dim: int, heads: int, fused: bool):
        super().__init__()
        self.heads, self.fused = heads, fused
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        B, N, D = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)  # (B, H, N, d) each
        if self.fused:
            out = F.scaled_dot_product_attention(q, k, v)
        else:
            out = ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.proj(out.transpose(1, 2).reshape(B, N, D))


class TwinBlock(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float, fused: bool):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=_EPS)
        self.attn = TwinAttention(dim, heads, fused)
        self.norm2 = nn.LayerNorm(dim, eps=_EPS)
        hidden = int(dim * mlp_ratio)
        self.mlp = nn.Sequential()
        self.mlp.add_module("fc1", nn.Linear(dim, hidden))
        self.mlp.add_module("act", nn.GELU())
        self.mlp.add_module("fc2", nn.Linear(hidden, dim))

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class TwinMAE(nn.Module):
    """``twin(images, mask_ratio) -> (loss, pred, mask)``; noise is the call's first draw, by ``rand``."""

    def __init__(self, config: ModelConfig, fused: bool = False, rand: Callable[..., Tensor] = torch.rand):
        super().__init__()
        self.config = config
        self.rand = rand
        D, E, L, p = config.embed_dim, config.decoder_embed_dim, config.patches, config.patch_size
        self.cls_token = nn.Parameter(torch.zeros(1, 1, D))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + L, D), requires_grad=False)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, E))
        self.decoder_pos_embed = nn.Parameter(torch.zeros(1, 1 + L, E), requires_grad=False)
        self.patch_embed = nn.Sequential()
        self.patch_embed.add_module("proj", nn.Conv2d(config.in_chans, D, p, p))
        self.blocks = nn.Sequential(*(TwinBlock(D, config.num_heads, config.mlp_ratio, fused) for _ in range(config.depth)))
        self.norm = nn.LayerNorm(D, eps=_EPS)
        self.decoder_embed = nn.Linear(D, E)
        self.decoder_blocks = nn.Sequential(
            *(TwinBlock(E, config.decoder_num_heads, config.mlp_ratio, fused) for _ in range(config.decoder_depth))
        )
        self.decoder_norm = nn.LayerNorm(E, eps=_EPS)
        self.decoder_pred = nn.Linear(E, config.patch_values)

    def forward(self, images: Tensor, mask_ratio: float = 0.75) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised float ``images`` (B, C, H, W): loss, pred (B, L, P), mask (B, L) with 1 for removed patches."""
        B, L, D = images.shape[0], self.config.patches, self.config.embed_dim
        noise = self.rand(B, L, device=images.device)
        order = noise.argsort(1)
        back = order.argsort(1)
        K = int(L * (1 - mask_ratio))
        x = self.patch_embed(images).flatten(2).transpose(1, 2) + self.pos_embed[:, 1:]
        x = x.gather(1, order[:, :K, None].expand(-1, -1, D))
        x = torch.cat([(self.cls_token + self.pos_embed[:, :1]).expand(B, -1, -1), x], 1)
        x = self.decoder_embed(self.norm(self.blocks(x)))
        filled = torch.cat([x[:, 1:], self.mask_token.expand(B, L - K, -1)], 1)
        filled = filled.gather(1, back[:, :, None].expand(-1, -1, x.shape[2]))
        x = torch.cat([x[:, :1], filled], 1) + self.decoder_pos_embed
        pred = self.decoder_pred(self.decoder_norm(self.decoder_blocks(x)))[:, 1:]
        mask = (back >= K).to(images.dtype)
        error = (pred - self._target(images)).square().mean(-1)
        return (error * mask).sum() / mask.sum(), pred, mask

    def _target(self, images: Tensor) -> Tensor:
        B, C, H, W = images.shape
        p = self.config.patch_size
        target = images.reshape(B, C, H // p, p, W // p, p).permute(0, 2, 4, 3, 5, 1).reshape(B, -1, p * p * C)
        if self.config.norm_pix_loss:
            target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + _EPS).sqrt()
        return target
