"""The residual addition and the LayerNorm that follows it, in one pass; their gradients, and a bias's, in another.

    sum = x + branch;      normed = (sum - mean) * rstd * weight + bias,      rstd = 1 / sqrt(var + eps)

    with e = grad_normed * weight and n = (sum - mean) * rstd:
    grad_sum <- grad_sum + rstd * (e - mean_D(e) - n * mean_D(e * n)),        the gradient of x and of branch
    grad_weight = sum over rows of grad_normed * n,    grad_bias = of grad_normed,    grad_branch_bias = of grad_sum

D channels, rows all that come before them. Everything is computed in float32 and rounded once; the variance is that of the
rounded sum, biased (D), in two passes over registers. The backward pass normalises the kept sum again. ``branch_bias`` is
the bias of the linear layer that made ``branch``, which has added it: it is not read here, and only receives its gradient,
so that no further pass over the branch's gradient is needed. No atomics: sums over rows have a fixed order.
Source: Ba et al. 2016 (arXiv 1607.06450).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmae.kernels.dispatch import programs, use_triton

_FWD_TILE = 2048  # values that a program holds
_BWD_WARPS = 2560  # of all programs of the gradient, so that all run at once: 24 for each of an A100's 108 multiprocessors


def add_norm(
    x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor, eps: float, branch_bias: Tensor | None = None,
    dtype: torch.dtype | None = None, use_sum: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The sum (..., D) in x's dtype, and its LayerNorm (..., D) in ``dtype``, by default x's.

    ``x`` and ``branch`` (..., D) floating point; without a branch the sum is ``x`` itself, and is not written. ``weight``
    and ``bias`` (D,). ``branch_bias`` (D,) receives the sum over rows of the branch's gradient, not rounded to the branch's
    dtype before. Differentiable, once, in all tensors; with ``use_sum`` false, for the norm that ends a stack of blocks, not
    through the sum, whose gradient a compiled graph would else fill with zeros. No tensor may be passed twice: torch.compile
    mixes up their gradients. Raises ValueError on a wrong shape or dtype.
    """
    _check(x, branch, weight, bias, branch_bias)
    return _AddNorm.apply(x, branch, weight, bias, eps, branch_bias, x.dtype if dtype is None else dtype, use_sum)


def _check(x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor, branch_bias: Tensor | None) -> None:
    if x.ndim < 1 or x.shape[-1] < 1 or not x.is_floating_point():
        raise ValueError(f"x must be floating point (..., D), got {x.dtype} {tuple(x.shape)}")
    if branch is not None and (branch.shape != x.shape or not branch.is_floating_point()):
        raise ValueError(f"branch must be floating point {tuple(x.shape)}, as x is, got {branch.dtype} {tuple(branch.shape)}")
    if branch is None and branch_bias is not None:
        raise ValueError("branch_bias needs a branch, whose gradient it sums")
    for name, t in (("weight", weight), ("bias", bias), ("branch_bias", branch_bias)):
        if t is not None and (t.shape != x.shape[-1:] or not t.is_floating_point()):
            raise ValueError(f"{name} must be floating point ({x.shape[-1]},), got {t.dtype} {tuple(t.shape)}")
    if any(t is not None and t.device != x.device for t in (branch, weight, bias, branch_bias)):
        raise ValueError(f"all inputs must be on the device of x, {x.device}")


def add_norm_ref(
    x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The twin of the forward op: sum, normed, and mean and 1/std of each row (...), in plain torch."""
    compute = torch.promote_types(x.dtype, torch.float32)
    total = x if branch is None else (x.to(compute) + branch.to(compute)).to(x.dtype)
    normed, mean, rstd = torch.native_layer_norm(total.to(compute), x.shape[-1:], weight.to(compute), bias.to(compute), eps)
    return total.contiguous(), normed.to(dtype), mean.squeeze(-1), rstd.squeeze(-1)


def add_norm_bwd_ref(
    grad_normed: Tensor, grad_sum: Tensor | None, total: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, low: torch.dtype,
    sums: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The twin of the backward op: the gradients of x and, if ``low``, its branch's dtype, is another, of the branch, and
    partial sums (G, ``sums``, D) of the gradients of weight, bias and, the third, branch_bias; here all in the first of G."""
    compute = mean.dtype
    grad, grad_weight, grad_bias = torch.ops.aten.native_layer_norm_backward(
        grad_normed.to(compute), total.to(compute), total.shape[-1:], mean[..., None], rstd[..., None], weight.to(compute),
        weight.to(compute), [True, True, True],
    )  # fmt: skip
    grad = grad if grad_sum is None else grad + grad_sum.to(compute)
    partial = grad.new_zeros(_bwd_launch(total)[0], sums, total.shape[-1])
    partial[:1] = torch.stack([grad_weight, grad_bias, grad.reshape(-1, total.shape[-1]).sum(0)][:sums])
    grad_x = grad.to(total.dtype).contiguous()
    return grad_x, grad.to(low).contiguous() if low != total.dtype else total.new_empty(0), partial


def _bwd_launch(x: Tensor) -> tuple[int, int, int, int]:
    """Programs of the gradient, the rows and columns that each holds at a time, and its warps: side by side across the columns,
    so that a thread adds up rows by itself, with 8 values to a thread: twice as many leave room for half the programs."""
    D = x.shape[-1]
    block_d = max(4, triton.next_power_of_2(D))
    warps = max(1, min(32, block_d // 128, max(8, block_d // 256)))
    block_r = max(1, 256 * warps // block_d)
    return programs(triton.cdiv(x.numel() // D, block_r), _BWD_WARPS // warps), block_r, block_d, warps


@triton.jit
def _add_norm_fwd_kernel(sum_ptr, normed_ptr, mean_ptr, rstd_ptr, x_ptr, branch_ptr, weight_ptr, bias_ptr, rows, D,
                         EPS: tl.constexpr, HAS_BRANCH: tl.constexpr,
                         BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * BLOCK_R  # one program per BLOCK_R rows; rows * D may pass 2**31
    # 4 columns to a thread suit float32; with 8, as bfloat16 would have it, float32 goes through shared memory to be stored.
    r, d = tl.arange(0, BLOCK_R), tl.max_contiguous(tl.arange(0, BLOCK_D), 4)
    is_row = first + r < rows
    inside = is_row[:, None] & (d < D)[None, :]
    at = r[:, None] * D + d[None, :]
    x = tl.load(x_ptr + first * D + at, mask=inside, other=0.0)
    if HAS_BRANCH:
        branch = tl.load(branch_ptr + first * D + at, mask=inside, other=0.0)
        x = (x.to(tl.float32) + branch.to(tl.float32)).to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + first * D + at, x, mask=inside)
    x = x.to(tl.float32)
    mean = tl.sum(x, 1) / D
    deviation = tl.where(inside, x - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt_rn(tl.sum(deviation * deviation, 1) / D + EPS)
    weight = tl.load(weight_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    y = deviation * rstd[:, None] * weight[None, :] + bias[None, :]
    tl.store(normed_ptr + first * D + at, y.to(normed_ptr.dtype.element_ty), mask=inside)
    tl.store(mean_ptr + first + r, mean, mask=is_row)
    tl.store(rstd_ptr + first + r, rstd, mask=is_row)


@triton.jit
def _add_norm_bwd_kernel(grad_x_ptr, grad_low_ptr, partial_ptr, grad_normed_ptr, grad_sum_ptr, sum_ptr, weight_ptr,
                         mean_ptr, rstd_ptr, rows, D, tiles, HAS_GRAD_SUM: tl.constexpr, HAS_LOW: tl.constexpr,
                         SUMS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    group, groups = tl.program_id(0), tl.num_programs(0)  # one program per ``groups``-th tile of BLOCK_R rows
    r, d = tl.arange(0, BLOCK_R), tl.max_contiguous(tl.arange(0, BLOCK_D), 4)  # as in the forward pass
    at = r[:, None] * D + d[None, :]
    weight = tl.load(weight_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    grad_weight = tl.zeros([BLOCK_D], dtype=tl.float32)
    grad_bias = tl.zeros([BLOCK_D], dtype=tl.float32)
    grad_branch_bias = tl.zeros([BLOCK_D], dtype=tl.float32)
    height = tl.full((), BLOCK_R, tl.int64)  # rows * D may pass 2**31
    for tile in range(group, tiles, groups):
        first = tile * height
        is_row = first + r < rows
        inside = is_row[:, None] & (d < D)[None, :]
        mean = tl.load(mean_ptr + first + r, mask=is_row, other=0.0)
        rstd = tl.load(rstd_ptr + first + r, mask=is_row, other=0.0)
        grad = tl.load(grad_normed_ptr + first * D + at, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(sum_ptr + first * D + at, mask=inside, other=0.0).to(tl.float32)
        grad_sum = 0.0
        if HAS_GRAD_SUM:
            grad_sum = tl.load(grad_sum_ptr + first * D + at, mask=inside, other=0.0).to(tl.float32)
        n = (x - mean[:, None]) * rstd[:, None]
        e = grad * weight[None, :]
        grad_weight += tl.sum(grad * n, 0)
        grad_bias += tl.sum(grad, 0)
        dx = (e - (tl.sum(e, 1) / D)[:, None] - n * (tl.sum(e * n, 1) / D)[:, None]) * rstd[:, None] + grad_sum
        tl.store(grad_x_ptr + first * D + at, dx.to(grad_x_ptr.dtype.element_ty), mask=inside)
        if HAS_LOW:
            tl.store(grad_low_ptr + first * D + at, dx.to(grad_low_ptr.dtype.element_ty), mask=inside)
        if SUMS == 3:
            grad_branch_bias += tl.sum(dx, 0)
    partial_ptr += group * SUMS * D + d
    tl.store(partial_ptr, grad_weight, mask=d < D)
    tl.store(partial_ptr + D, grad_bias, mask=d < D)
    if SUMS == 3:
        tl.store(partial_ptr + 2 * D, grad_branch_bias, mask=d < D)


@torch.library.custom_op("fastmae::add_norm", mutates_args=())
def _add_norm(
    x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if not use_triton(x):
        total, *rest = add_norm_ref(x, branch, weight, bias, eps, dtype)
        return x.new_empty(0) if branch is None else total, *rest  # an op may not return what it was given
    D, x = x.shape[-1], x.contiguous()
    total = torch.empty_like(x) if branch is not None else x.new_empty(0)
    normed = torch.empty_like(x, dtype=dtype)
    mean, rstd = (torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device) for _ in range(2))
    block_d = max(4, triton.next_power_of_2(D))
    block_r = max(1, _FWD_TILE // block_d)
    if rows := x.numel() // D:
        with torch.cuda.device_of(x):
            _add_norm_fwd_kernel[(triton.cdiv(rows, block_r),)](
                total, normed, mean, rstd, x, x if branch is None else branch.contiguous(), weight.contiguous(),
                bias.contiguous(), rows, D, EPS=eps, HAS_BRANCH=branch is not None, BLOCK_R=block_r, BLOCK_D=block_d,
                num_warps=min(32, max(4, block_d // 512)),
            )  # fmt: skip
    return total, normed, mean, rstd


@_add_norm.register_fake
def _(x, branch, weight, bias, eps, dtype):
    statistic = torch.promote_types(x.dtype, torch.float32)
    total = x.new_empty(x.shape if branch is not None else (0,))
    return total, x.new_empty(x.shape, dtype=dtype), *(x.new_empty(x.shape[:-1], dtype=statistic) for _ in range(2))


@torch.library.custom_op("fastmae::add_norm_bwd", mutates_args=())
def _add_norm_bwd(
    grad_normed: Tensor, grad_sum: Tensor | None, total: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, low: torch.dtype,
    sums: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if not use_triton(total):
        return add_norm_bwd_ref(grad_normed, grad_sum, total, weight, mean, rstd, low, sums)
    D, total = total.shape[-1], total.contiguous()
    grad_x, has_low = torch.empty_like(total), low != total.dtype
    grad_low = torch.empty(total.shape if has_low else 0, dtype=low, device=total.device)
    groups, block_r, block_d, warps = _bwd_launch(total)
    partial = torch.empty(groups, sums, D, dtype=torch.float32, device=total.device)
    if rows := total.numel() // D:
        with torch.cuda.device_of(total):
            _add_norm_bwd_kernel[(groups,)](
                grad_x, grad_low if has_low else grad_x, partial, grad_normed.contiguous(),
                total if grad_sum is None else grad_sum.contiguous(), total, weight.contiguous(), mean, rstd,
                rows, D, triton.cdiv(rows, block_r), HAS_GRAD_SUM=grad_sum is not None, HAS_LOW=has_low, SUMS=sums,
                BLOCK_R=block_r, BLOCK_D=block_d, num_warps=warps,
            )  # fmt: skip
    return grad_x, grad_low, partial


@_add_norm_bwd.register_fake
def _(grad_normed, grad_sum, total, weight, mean, rstd, low, sums):
    grad_low = total.new_empty(total.shape if low != total.dtype else (0,), dtype=low)
    return total.new_empty(total.shape), grad_low, mean.new_empty(_bwd_launch(total)[0], sums, total.shape[-1])


class _AddNorm(torch.autograd.Function):
    """Around the ops, because ``branch_bias`` has a gradient and is not read."""

    @staticmethod
    def forward(ctx, x, branch, weight, bias, eps, branch_bias, dtype, use_sum):
        total, normed, mean, rstd = _add_norm(x, branch, weight, bias, eps, dtype)
        total = x.view_as(x) if branch is None else total
        ctx.set_materialize_grads(False)  # a sum that nobody uses has no gradient to read
        ctx.save_for_backward(total, weight, mean, rstd)
        ctx.dtypes, ctx.use_sum = [None if t is None else t.dtype for t in (branch, weight, bias, branch_bias)], use_sum
        if not use_sum:
            ctx.mark_non_differentiable(total)
        return total, normed

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_sum, grad_normed):
        total, *rest = ctx.saved_tensors
        low, *dtypes = ctx.dtypes
        grad_sum = grad_sum if ctx.use_sum else None  # zeros in a compiled graph
        grad_normed = torch.zeros_like(total) if grad_normed is None else grad_normed
        sums = 2 if dtypes[2] is None else 3
        grad_x, grad_low, partial = _add_norm_bwd(grad_normed, grad_sum, total, *rest, low or total.dtype, sums)
        grad_branch = None if low is None else grad_x if low == total.dtype else grad_low
        grad_weight, grad_bias, grad_branch_bias = (*partial.sum(0).unbind(0), None)[:3]
        if grad_branch_bias is not None:
            grad_branch_bias = grad_branch_bias.to(dtypes[2])
        return grad_x, grad_branch, grad_weight.to(dtypes[0]), grad_bias.to(dtypes[1]), None, grad_branch_bias, None, None
