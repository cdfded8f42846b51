"""The transformer block of encoder and decoder: pre-norm attention and MLP around a residual stream.

    x <- x + proj(attention(qkv(norm1(x))));    x <- x + fc2(gelu(fc1(norm2(x))))

LayerNorm eps 1e-6, one fused qkv layer with bias, exact (erf) GELU; no dropout, drop path or layer scale.
Source: Dosovitskiy et al. 2020 (arXiv 2010.11929), section 3.1; parameter names are those of timm's ViT.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from fastmae.attention import attention

LAYER_NORM_EPS = 1e-6


class Attention(nn.Module):
    """Multi-head self-attention over D channels."""

    def __init__(self, dim: int, heads: int, backend: str):
        super().__init__()
        self.heads = heads
        self.backend = backend
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, first: int = 0) -> Tensor:
        """Attention of the tokens from ``first`` on over all tokens of ``x`` (B, N, D): (B, N - first, D)."""
        B, N, D = x.shape
        if first == 0:
            q, k, v = self.qkv(x).view(B, N, 3, self.heads, D // self.heads).unbind(2)
        else:  # keys and values of every token, queries of the last ones only
            weight, bias = self.qkv.weight, self.qkv.bias
            q = F.linear(x[:, first:], weight[:D], bias[:D]).view(B, N - first, self.heads, D // self.heads)
            k, v = F.linear(x, weight[D:], bias[D:]).view(B, N, 2, self.heads, D // self.heads).unbind(2)
        return self.proj(attention(q, k, v, self.backend).reshape(B, N - first, D))


class Mlp(nn.Module):
    """Two linear layers with an exact GELU between them."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """One transformer block."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float, backend: str):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.attn = Attention(dim, heads, backend)
        self.norm2 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor, first: int = 0) -> Tensor:
        """(B, N, D) -> (B, N - first, D): the tokens from ``first`` on, having attended to all of them."""
        x = x[:, first:] + self.attn(self.norm1(x), first)
        return x + self.mlp(self.norm2(x))
