"""The exact GELU, whose gradient and that of the bias before it are made in one pass.

    y = x * F(x),                        F(x) = (1 + erf(x / sqrt(2))) / 2
    grad_x = grad * (F(x) + x * f(x)),   f(x) = exp(-x**2 / 2) / sqrt(2 pi)
    grad_bias = sum over rows of grad_x

D channels, rows all that come before them. The forward pass is torch's own, which torch.compile fuses with what is around it.
The backward pass computes in float32 and rounds once. ``bias`` is that of the linear layer that made ``x``, which has added it:
it is not read here, and only receives its gradient, so that no further pass over x's gradient is needed. No atomics: sums over
rows have a fixed order. Source: Hendrycks & Gimpel 2016 (arXiv 1606.08415).
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from fastmae.kernels.dispatch import programs, use_triton

_BLOCK_R, _BLOCK_D = 8, 256  # of the tile that a program holds
_MOST_PROGRAMS = 756  # which all run at once: 7 for each of an A100's 108 multiprocessors


def gelu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """The GELU of ``x`` (..., D), floating point, in its dtype.

    ``bias`` (D,) receives the sum over rows of x's gradient, not rounded to x's dtype before. Differentiable once with a bias.
    Raises ValueError on a wrong shape or dtype.
    """
    if x.ndim < 1 or x.shape[-1] < 1 or not x.is_floating_point():
        raise ValueError(f"x must be floating point (..., D), got {x.dtype} {tuple(x.shape)}")
    if bias is None:
        return F.gelu(x)  # there is nothing to sum
    if bias.shape != x.shape[-1:] or not bias.is_floating_point():
        raise ValueError(f"bias must be floating point ({x.shape[-1]},), got {bias.dtype} {tuple(bias.shape)}")
    if bias.device != x.device:
        raise ValueError(f"bias must be on the device of x, {x.device}, got {bias.device}")
    return _Gelu.apply(x, bias)


def gelu_ref(x: Tensor) -> Tensor:
    """The twin of the forward pass, and the pass itself."""
    return F.gelu(x)


def gelu_bwd_ref(grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """The twin of the backward op: x's gradient, and partial sums of it over rows (G, D), here all in the first of G."""
    compute = torch.promote_types(x.dtype, torch.float32)
    grad_x = torch.ops.aten.gelu_backward(grad.to(compute).contiguous(), x.to(compute).contiguous())
    partial = grad_x.new_zeros(_groups(x), x.shape[-1])
    partial[:1] = grad_x.reshape(-1, x.shape[-1]).sum(0)
    return grad_x.to(x.dtype), partial


def _groups(x: Tensor) -> int:
    """Programs that share the rows of a block of columns."""
    D = x.shape[-1]
    columns = triton.cdiv(D, _BLOCK_D)
    return programs(triton.cdiv(x.numel() // D, _BLOCK_R), max(1, _MOST_PROGRAMS // columns))


@triton.jit
def _gelu_bwd_kernel(grad_x_ptr, partial_ptr, grad_ptr, x_ptr, rows, D, tiles, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    group, groups = tl.program_id(0), tl.num_programs(0)  # one program per BLOCK_D columns of every ``groups``-th BLOCK_R rows
    r, d = tl.arange(0, BLOCK_R), tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    at = r[:, None] * D + d[None, :]
    total = tl.zeros([BLOCK_R, BLOCK_D], dtype=tl.float32)
    height = tl.full((), BLOCK_R, tl.int64)  # rows * D may pass 2**31
    for tile in range(group, tiles, groups):
        first = tile * height
        inside = (first + r < rows)[:, None] & (d < D)[None, :]
        x = tl.load(x_ptr + first * D + at, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + first * D + at, mask=inside, other=0.0).to(tl.float32)
        cdf = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)  # 1 / sqrt(2)
        pdf = 0.3989422804014327 * tl.exp(-0.5 * x * x)  # 1 / sqrt(2 pi)
        dx = grad * (cdf + x * pdf)
        tl.store(grad_x_ptr + first * D + at, dx.to(grad_x_ptr.dtype.element_ty), mask=inside)
        total += dx
    tl.store(partial_ptr + group * D + d, tl.sum(total, 0), mask=d < D)


@torch.library.custom_op("fastmae::gelu_bwd", mutates_args=())
def _gelu_bwd(grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    if not use_triton(x):
        return gelu_bwd_ref(grad, x)
    D, x = x.shape[-1], x.contiguous()
    grad_x, partial = torch.empty_like(x), torch.empty(_groups(x), D, dtype=torch.float32, device=x.device)
    if rows := x.numel() // D:
        with torch.cuda.device_of(x):
            _gelu_bwd_kernel[(partial.shape[0], triton.cdiv(D, _BLOCK_D))](
                grad_x, partial, grad.contiguous(), x, rows, D, triton.cdiv(rows, _BLOCK_R), BLOCK_R=_BLOCK_R, BLOCK_D=_BLOCK_D
            )
    return grad_x, partial


@_gelu_bwd.register_fake
def _(grad, x):
    return x.new_empty(x.shape), x.new_empty(_groups(x), x.shape[-1], dtype=torch.promote_types(x.dtype, torch.float32))


class _Gelu(torch.autograd.Function):
    """Around the op, because ``bias`` has a gradient and is not read."""

    @staticmethod
    def forward(ctx, x, bias):
        ctx.save_for_backward(x)
        ctx.bias_dtype = bias.dtype
        return F.gelu(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        grad_x, partial = _gelu_bwd(grad, *ctx.saved_tensors)
        return grad_x, partial.sum(0).to(ctx.bias_dtype)
