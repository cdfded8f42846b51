"""The transformer block of encoder and decoder: pre-norm attention and MLP around a residual stream.

    x <- x + proj(attention(qkv(norm1(x))));    x <- x + fc2(gelu(fc1(norm2(x))))

LayerNorm eps 1e-6, one fused qkv layer with bias, exact (erf) GELU; no dropout, drop path or layer scale. A block leaves its
last sum to the next one, which normalises it in the same pass: the stream between two blocks is ``x + branch``.
Source: Dosovitskiy et al. 2020 (arXiv 2010.11929), section 3.1; parameter names are those of timm's ViT.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastmae.model.attention.dot_product import attention
from fastmae.model.block.choice import BlockShape, fused_names
from fastmae.model.block.fused import add_and_norm, fused_block, joined
from fastmae.model.block.linear import Linear, compute_dtype, gelu_linear, is_plain, linear, norm_linear

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
            q, packed = None, norm_linear(x, norm, self.qkv).view(B, N, 3, self.heads, D // self.heads)
        else:  # keys and values of every token, queries of the last ones only
            weight, bias, x = self.qkv.weight, self.qkv.bias, norm(x)
            q = linear(x[:, first:], weight[:D], bias[:D]).view(B, N - first, self.heads, D // self.heads)
            packed = linear(x, weight[D:], bias[D:]).view(B, N, 2, self.heads, D // self.heads)
        return self.proj(attention(packed, q, self.backend).reshape(B, N - first, D))


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
    """One transformer block.

    ``block(x, branch, branch_bias, first)`` -> x, branch, branch_bias: the stream is ``x + branch``, before and after.
    """

    def __init__(self, dim: int, heads: int, mlp_ratio: float, backend: str, fused: str = "auto"):
        super().__init__()
        self.fused = fused
        self.norm1 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.attn = Attention(dim, heads, backend)
        self.norm2 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(
        self, x: Tensor, branch: Tensor | None = None, branch_bias: Tensor | None = None, first: int = 0
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The stream ``x + branch`` (B, N, D), ``branch`` None for zero, to that of tokens ``first``..., which attend to all
        of them: two tensors (B, N - first, D).

        ``branch_bias``: the bias of the layer that made ``branch``, if its gradient is left to whoever adds the two.
        """
        if (names := self.fused_at(x, first)) is not None:
            return fused_block(self, x, branch, branch_bias, first, names)
        x = joined(x, branch, branch_bias)
        x = x[:, first:] + self.attn(x, self.norm1, first)
        return x, self.mlp(x, self.norm2), None

    def fused_at(self, x: Tensor, first: int = 0) -> tuple[str, ...] | None:
        """Which of ``config.FUSED`` are used on a stream like ``x`` (B, N, D); None for the plain block."""
        if self.fused == "off" or not self._is_plain():
            return None
        shape = BlockShape(x.shape[1], first, x.shape[2], self.attn.heads, self.mlp.fc1.out_features)
        return fused_names(self.fused, x.device.type, compute_dtype(x), x.dtype, shape) or None

    def _is_plain(self) -> bool:
        """Whether its modules are what it has made: those with a hook, a parametrisation or another class are called."""
        parts = ((self.norm1, nn.LayerNorm), (self.attn, Attention), (self.attn.qkv, Linear), (self.attn.proj, Linear),
                 (self.norm2, nn.LayerNorm), (self.mlp, Mlp), (self.mlp.fc1, Linear), (self.mlp.fc2, Linear))  # fmt: skip
        return all(is_plain(module, kind) for module, kind in parts)


def run_blocks(
    blocks: Sequence[Block], x: Tensor, norm: nn.LayerNorm, *, first: int = 0, checkpointing: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """``norm`` of ``x`` (B, N, D) after all ``blocks``, in the last of which the tokens ``first``... attend: (B, N - first, D)
    in ``dtype``, by default that of ``norm``'s own result. With ``checkpointing`` only the stream between the blocks is kept
    for the backward pass, which recomputes them."""
    branch = branch_bias = names = None
    for block in blocks:
        begin = first if block is blocks[-1] else 0
        names = block.fused_at(x, begin)
        if checkpointing and torch.is_grad_enabled():
            x = checkpoint(_run_and_add, block, x, begin, use_reentrant=False, preserve_rng_state=False)  # draws no numbers
        else:
            x, branch, branch_bias = block(x, branch, branch_bias, begin)
    if names is not None and is_plain(norm, nn.LayerNorm):
        dtype = dtype or compute_dtype(x, norms=True)
        return add_and_norm(norm, x, branch, branch_bias, dtype, names, use_sum=False)[1]
    y = norm(joined(x, branch, branch_bias))
    return y if dtype is None else y.to(dtype)


def _run_and_add(block: Block, x: Tensor, first: int) -> Tensor:
    return joined(*block(x, None, None, first))
