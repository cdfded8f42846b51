"""A block by fused operations: the same arithmetic in fewer passes over memory and fewer launches.

Every pass over a gradient that sums its columns for a bias is saved: the operation that makes the gradient sums it in the same
pass. So a layer adds its bias detached, and what takes its result returns the bias's gradient: attention that of qkv, the
residual sum those of proj and fc2, GELU that of fc1. Which operations are fused is one choice for a block
(``fastmae.model.block.choice``); all of them together is what the traffic of a step is counted with (``docs/traffic.md``).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmae.kernels import add_norm, gelu
from fastmae.model.attention.backends import RETURN_BIAS
from fastmae.model.attention.dot_product import attention, resolved
from fastmae.model.block.linear import compute_dtype
from fastmae.model.block.low_linear import low_linear, weights_of


def fused_block(
    block: nn.Module, x: Tensor, branch: Tensor | None, branch_bias: Tensor | None, first: int, names: tuple[str, ...]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What a ``Block`` computes of ``x``, ``branch``, ``branch_bias`` and ``first``, with the operations ``names`` fused, of
    ``config.FUSED``."""
    attn, mlp = block.attn, block.mlp
    adds, activates = "add_norm" in names, "gelu" in names
    low = compute_dtype(x)
    is_cast = "linear" in names and low != attn.qkv.weight.dtype
    qkv, proj, fc1, fc2 = weights_of([attn.qkv, attn.proj, mlp.fc1, mlp.fc2], low if is_cast else None)

    x, y = add_and_norm(block.norm1, x, branch, branch_bias, low, names)
    B, N, D = y.shape
    heads = (attn.heads, D // attn.heads)
    backend = resolved(attn.backend, y.device.type, low, N - first, N, *heads)
    own = backend in RETURN_BIAS
    if first == 0:
        q, packed = None, low_linear(y, qkv, not own).view(B, N, 3, *heads)
    else:  # keys and values of every token, queries of the last ones only
        q = low_linear(y[:, first:], qkv.rows(None, D), not own).view(B, N - first, *heads)
        packed = low_linear(y, qkv.rows(D, None), not own).view(B, N, 2, *heads)
        x = x[:, first:].contiguous()
    y = attention(packed, q, backend, attn.qkv.bias if own else None).reshape(B, N - first, D)
    y = low_linear(y, proj, not adds)

    x, y = add_and_norm(block.norm2, x, y, attn.proj.bias if adds else None, low, names)
    y = low_linear(y, fc1, not activates)
    y = gelu(y, mlp.fc1.bias) if activates else F.gelu(y)
    # A copy, because a sharded block frees its weights' memory when it has run.
    return x, low_linear(y, fc2, not adds), mlp.fc2.bias.clone() if adds else None


def add_and_norm(
    norm: nn.LayerNorm, x: Tensor, branch: Tensor | None, branch_bias: Tensor | None, dtype: torch.dtype,
    names: tuple[str, ...], *, use_sum: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``x + branch`` (B, N, D), and ``norm`` of it in ``dtype``. ``use_sum``: whether the sum itself is used as well."""
    if "add_norm" in names:
        return add_norm(x, branch, norm.weight, norm.bias, norm.eps, branch_bias, dtype, use_sum)
    x = joined(x, branch, branch_bias)
    return x, norm(x).to(dtype)


def joined(x: Tensor, branch: Tensor | None, branch_bias: Tensor | None) -> Tensor:
    """``x + branch`` (B, N, D); ``branch_bias`` (D,) gets its gradient, the column sums of ``branch``'s."""
    if branch is None:
        return x
    return x + (branch if branch_bias is None else _BiasGradient.apply(branch, branch_bias))


class _BiasGradient(torch.autograd.Function):
    """A branch whose layer has added its bias detached: the gradient passes, and its column sums are the bias's."""

    @staticmethod
    def forward(branch, bias):
        return branch.view_as(branch)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.dtype = inputs[1].dtype

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return grad, grad.flatten(0, -2).sum(0, dtype=ctx.dtype)
