"""The transformer block of encoder and decoder: pre-norm attention and MLP around a residual stream.

    x <- x + proj(attention(qkv(norm1(x))));    x <- x + fc2(gelu(fc1(norm2(x))))

LayerNorm eps 1e-6, one fused qkv layer with bias, exact (erf) GELU; no dropout, drop path or layer scale.
Source: Dosovitskiy et al. 2020 (arXiv 2010.11929), section 3.1; parameter names are those of timm's ViT.
"""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastmae.model.attention.dot_product import attention
from fastmae.model.linear import Linear, gelu_linear, linear, norm_linear

LAYER_NORM_EPS = 1e-6


class Attention(nn.Module):
    """Multi-head self-attention over D channels."""

    def __init__(self, dim: int, heads: int, backend: str):
        super().__init__()
        self.heads = heads
        self.backend = backend
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor, norm: nn.LayerNorm, first: int = 0) -> Tensor:
        """Attention of tokens ``first``... over all tokens of ``norm(x)``, x (B, N, D): (B, N - first, D)."""
        B, N, D = x.shape
        if first == 0:
            q, k, v = norm_linear(x, norm, self.qkv).view(B, N, 3, self.heads, D // self.heads).unbind(2)
        else:  # keys and values of every token, queries of the last ones only
            weight, bias, x = self.qkv.weight, self.qkv.bias, norm(x)
            q = linear(x[:, first:], weight[:D], bias[:D]).view(B, N - first, self.heads, D // self.heads)
            k, v = linear(x, weight[D:], bias[D:]).view(B, N, 2, self.heads, D // self.heads).unbind(2)
        return self.proj(attention(q, k, v, self.backend).reshape(B, N - first, D))


class Mlp(nn.Module):
    """Two linear layers with an exact GELU between them."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = Linear(dim, hidden)
        self.fc2 = Linear(hidden, dim)

    def forward(self, x: Tensor, norm: nn.LayerNorm) -> Tensor:
        """The MLP of ``norm(x)``: (B, N, D) -> (B, N, D)."""
        return gelu_linear(norm_linear(x, norm, self.fc1), self.fc2)


class Block(nn.Module):
    """One transformer block."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float, backend: str):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.attn = Attention(dim, heads, backend)
        self.norm2 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor, first: int = 0) -> Tensor:
        """(B, N, D) -> (B, N - first, D): tokens ``first``..., which attend to all of them."""
        x = x[:, first:] + self.attn(x, self.norm1, first)
        return x + self.mlp(x, self.norm2)


def run_block(block: Block, x: Tensor, first: int = 0, *, checkpointing: bool) -> Tensor:
    """``block(x, first)``; with ``checkpointing`` only ``x`` is kept for the backward pass, which recomputes the block."""
    if checkpointing and torch.is_grad_enabled():
        return checkpoint(block, x, first, use_reentrant=False, preserve_rng_state=False)  # blocks draw no random numbers
    return block(x, first)


def residual_dtype(x: Tensor, residual: str) -> torch.dtype:
    """The dtype of the residual stream of ``x``: its own, or autocast's if ``residual`` is bf16."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if residual == "bf16" and torch.is_autocast_enabled(device) else x.dtype
