"""Linear layers under autocast whose weights are cast together, and whose weights' gradients are written in float32.

    y = x low(W)^T + low(b);    grad x = grad y low(W);    grad W = float32(grad y^T x);    grad b = sum of grad y

Autocast casts each weight and bias by itself, and each weight's gradient once more from low precision to float32: twelve
launches in a block, and a second pass over every gradient, which it has rounded. Here one launch casts all weights of a block,
and the product that makes a weight's gradient writes its float32 sums as they are. ``low`` is autocast's dtype.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Weights(NamedTuple):
    """A linear layer's weight (O, I) and bias (O,), and both in the dtype of the product, if they have been cast."""

    weight: Tensor
    bias: Tensor
    low_weight: Tensor | None = None
    low_bias: Tensor | None = None

    def rows(self, begin: int | None, end: int | None) -> "Weights":
        """The layer that makes the output channels ``begin``...``end`` alone."""
        return Weights(*(None if t is None else t[begin:end] for t in self))


def weights_of(layers: Sequence[nn.Linear], low: torch.dtype | None) -> list[Weights]:
    """The weights of ``layers``, cast to ``low`` in one launch; None leaves casts to autocast."""
    full = [t for layer in layers for t in (layer.weight, layer.bias)]
    cast = [None] * len(full) if low is None else torch.ops.fastmae.cast_all([t.detach() for t in full], low)
    return [Weights(*full[i : i + 2], *cast[i : i + 2]) for i in range(0, len(full), 2)]


def low_linear(x: Tensor, layer: Weights, bias_gradient: bool = True) -> Tensor:
    """``layer`` of ``x`` (..., I): (..., O). Without ``bias_gradient`` whoever takes the result returns that of the bias."""
    if layer.low_weight is None:
        return F.linear(x, layer.weight, layer.bias if bias_gradient else layer.bias.detach())
    return _LowLinear.apply(x, layer.weight, layer.bias if bias_gradient else None, layer.low_weight, layer.low_bias)


class _LowLinear(torch.autograd.Function):
    @staticmethod
    def forward(x, weight, bias, low_weight, low_bias):
        return F.linear(x, low_weight, low_bias)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, bias, low_weight, _ = inputs
        ctx.save_for_backward(x, low_weight)
        ctx.weight_dtype, ctx.bias_dtype = weight.dtype, None if bias is None else bias.dtype

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, low_weight = ctx.saved_tensors
        flat = grad.flatten(0, -2)
        grad_bias = None if ctx.bias_dtype is None else flat.sum(0, dtype=ctx.bias_dtype)
        return grad @ low_weight, _product(flat.t(), x.flatten(0, -2), ctx.weight_dtype), grad_bias, None, None


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """``a`` by ``b``, written in ``dtype``. Rounded to their own first where torch has no such product: on CPUs, and in another
    dtype than float32."""
    is_direct = a.is_cuda and dtype == torch.float32 and a.dtype in (torch.bfloat16, torch.float16)
    return torch.mm(a, b, out_dtype=dtype) if is_direct else (a @ b).to(dtype)


@torch.library.custom_op("fastmae::cast_all", mutates_args=())
def _cast_all(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    low = [torch.empty_like(t, dtype=dtype) for t in tensors]
    torch._foreach_copy_(low, tensors)
    return low


@_cast_all.register_fake
def _(tensors, dtype):
    return [torch.empty_like(t, dtype=dtype) for t in tensors]
