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
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    branch_bias: Tensor | None = None,
    dtype: torch.dtype | None = None,
    use_sum: bool = True,
) -> tuple[Tensor, Tensor]:
    """The sum (..., D) in x's dtype, and its LayerNorm (..., D) in ``dtype``, by default x's.

    ``x`` and ``branch`` (..., D) floating point; without a branch the sum is ``x`` itself, and is not written. ``weight``
    and ``bias`` (D,). ``branch_bias`` (D,) receives the sum over rows of the branch's gradient, not rounded to the branch's
    dtype before. Differentiable, once, in all tensors; with ``use_sum`` false, for the norm that ends a stack of blocks, not
    through the sum, whose gradient a compiled graph would else fill with zeros. Raises ValueError on a wrong shape or dtype.
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
    grad_normed: Tensor, grad_sum: Tensor | None, total: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor,
    branch_dtype: torch.dtype, sums: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The twin of the backward op: the gradients of x and, where their dtypes differ, of branch, and partial sums over rows
    (G, ``sums``, D) of the gradients of weight, bias and, if they are three, branch_bias; here all in the first of G."""
    compute = mean.dtype
    grad, grad_weight, grad_bias = torch.ops.aten.native_layer_norm_backward(
        grad_normed.to(compute), total.to(compute), total.shape[-1:], mean[..., None], rstd[..., None], weight.to(compute),
        weight.to(compute), [True, True, True],
    )  # fmt: skip
    if grad_sum is not None:
        grad = grad + grad_sum.to(compute)
    partial = grad.new_zeros(_groups(total), sums, total.shape[-1])
    if total.numel():
        partial[0] = torch.stack([grad_weight, grad_bias, _column_sums(grad)][:sums])
    grad_x = grad.to(total.dtype).contiguous()
    return grad_x, grad.to(branch_dtype).contiguous() if branch_dtype != total.dtype else total.new_empty(0), partial


def _column_sums(grad: Tensor) -> Tensor:
    return grad.flatten(0, -2).sum(0) if grad.ndim > 1 else grad


def _rows(x: Tensor) -> int:
    return x.numel() // x.shape[-1]


def _columns(D: int) -> int:
    return max(4, triton.next_power_of_2(D))


def _bwd_launch(D: int) -> tuple[int, int, int]:
    """Rows and columns that a program of the gradient holds at a time, and its warps: side by side across the columns, so
    that a thread adds up rows by itself, with 8 values to a thread: twice as many leave room for half the programs."""
    block_d = _columns(D)
    warps = max(1, min(32, block_d // 128, max(8, block_d // 256)))
    return max(1, 256 * warps // block_d), block_d, warps


def _groups(x: Tensor) -> int:
    """Programs of the gradient."""
    block_r, _, warps = _bwd_launch(x.shape[-1])
    return programs(triton.cdiv(_rows(x), block_r), _BWD_WARPS // warps)


@triton.jit
def _add_norm_fwd_kernel(
    sum_ptr,
    normed_ptr,
    mean_ptr,
    rstd_ptr,
    x_ptr,
    branch_ptr,
    weight_ptr,
    bias_ptr,
    rows,
    D,
    EPS: tl.constexpr,
    HAS_BRANCH: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
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
def _add_norm_bwd_kernel(grad_x_ptr, grad_branch_ptr, partial_ptr, grad_normed_ptr, grad_sum_ptr, sum_ptr, weight_ptr,
                         mean_ptr, rstd_ptr, rows, D, tiles, HAS_GRAD_SUM: tl.constexpr, HAS_GRAD_BRANCH: tl.constexpr,
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
        if HAS_GRAD_BRANCH:
            tl.store(grad_branch_ptr + first * D + at, dx.to(grad_branch_ptr.dtype.element_ty), mask=inside)
        if SUMS == 3:
            grad_branch_bias += tl.sum(dx, 0)
    partial_ptr += group * SUMS * D + d
    tl.store(partial_ptr, grad_weight, mask=d < D)
    tl.store(partial_ptr + D, grad_bias, mask=d < D)
    if SUMS == 3:
        tl.store(partial_ptr + 2 * D, grad_branch_bias, mask=d < D)


def _add_norm_triton(
    x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, D = _rows(x), x.shape[-1]
    x = x.contiguous()
    total = x if branch is None else torch.empty_like(x)
    normed = torch.empty_like(x, dtype=dtype)
    mean, rstd = (torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device) for _ in range(2))
    block_d = _columns(D)
    block_r = max(1, _FWD_TILE // block_d)
    if rows:
        with torch.cuda.device_of(x):
            _add_norm_fwd_kernel[(triton.cdiv(rows, block_r),)](
                total, normed, mean, rstd, x, x if branch is None else branch.contiguous(), weight.contiguous(),
                bias.contiguous(), rows, D, EPS=eps, HAS_BRANCH=branch is not None, BLOCK_R=block_r, BLOCK_D=block_d,
                num_warps=min(32, max(4, block_d // 512)),
            )  # fmt: skip
    return total, normed, mean, rstd


def _add_norm_bwd_triton(
    grad_normed: Tensor, grad_sum: Tensor | None, total: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor,
    branch_dtype: torch.dtype, sums: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    rows, D = _rows(total), total.shape[-1]
    total = total.contiguous()
    grad_x = torch.empty_like(total)
    has_grad_branch = branch_dtype != total.dtype
    grad_branch = torch.empty_like(total, dtype=branch_dtype) if has_grad_branch else total.new_empty(0)
    groups, (block_r, block_d, warps) = _groups(total), _bwd_launch(D)
    partial = torch.empty(groups, sums, D, dtype=torch.float32, device=total.device)
    if rows:
        with torch.cuda.device_of(total):
            _add_norm_bwd_kernel[(groups,)](
                grad_x, grad_branch if has_grad_branch else grad_x, partial, grad_normed.contiguous(),
                total if grad_sum is None else grad_sum.contiguous(), total, weight.contiguous(), mean, rstd,
                rows, D, triton.cdiv(rows, block_r), HAS_GRAD_SUM=grad_sum is not None, HAS_GRAD_BRANCH=has_grad_branch,
                SUMS=sums, BLOCK_R=block_r, BLOCK_D=block_d, num_warps=warps,
            )  # fmt: skip
    return grad_x, grad_branch, partial


@torch.library.custom_op("fastmae::add_norm", mutates_args=())
def _add_norm(
    x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    body = _add_norm_triton if use_triton(x) else add_norm_ref
    total, *rest = body(x, branch, weight, bias, eps, dtype)
    return x.new_empty(0) if branch is None else total, *rest  # an op may not return what it was given


@_add_norm.register_fake
def _(x, branch, weight, bias, eps, dtype):
    statistic = torch.promote_types(x.dtype, torch.float32)
    total = x.new_empty(x.shape if branch is not None else (0,))
    return total, x.new_empty(x.shape, dtype=dtype), *(x.new_empty(x.shape[:-1], dtype=statistic) for _ in range(2))


@torch.library.custom_op("fastmae::add_norm_bwd", mutates_args=())
def _add_norm_bwd(
    grad_normed: Tensor, grad_sum: Tensor | None, total: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor,
    branch_dtype: torch.dtype, sums: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    body = _add_norm_bwd_triton if use_triton(total) else add_norm_bwd_ref
    return body(grad_normed, grad_sum, total, weight, mean, rstd, branch_dtype, sums)


@_add_norm_bwd.register_fake
def _(grad_normed, grad_sum, total, weight, mean, rstd, branch_dtype, sums):
    grad_branch = total.new_empty(total.shape if branch_dtype != total.dtype else (0,), dtype=branch_dtype)
    return total.new_empty(total.shape), grad_branch, mean.new_empty(_groups(total), sums, total.shape[-1])


class _AddNorm(torch.autograd.Function):
    """Around the ops, because ``branch_bias`` has a gradient and is not read."""

    @staticmethod
    def forward(ctx, x, branch, weight, bias, eps, branch_bias, dtype, use_sum):
        total, normed, mean, rstd = _add_norm(x, branch, weight, bias, eps, dtype)
        if branch is None:
            total = x.view_as(x)
        ctx.set_materialize_grads(False)  # a sum or a normed that nobody uses has no gradient to read
        ctx.save_for_backward(total, weight, mean, rstd)
        ctx.dtypes = [None if t is None else t.dtype for t in (branch, weight, bias, branch_bias)]
        ctx.use_sum = use_sum
        if not use_sum:
            ctx.mark_non_differentiable(total)
        return total, normed

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_sum, grad_normed):
        total, weight, mean, rstd = ctx.saved_tensors
        branch_dtype, weight_dtype, bias_dtype, branch_bias_dtype = ctx.dtypes
        sums = 2 if branch_bias_dtype is None else 3
        grad_sum = grad_sum if ctx.use_sum else None  # a compiled graph gives zeros
        if grad_normed is None:
            grad_x, found = grad_sum, [None, None, _column_sums(grad_sum.to(mean.dtype))][:sums]
            grad_branch = None if branch_dtype is None else grad_sum.to(branch_dtype)
        else:
            grad_x, grad_branch, partial = _add_norm_bwd(
                grad_normed, grad_sum, total, weight, mean, rstd, branch_dtype or total.dtype, sums
            )
            if branch_dtype in (None, total.dtype):
                grad_branch = None if branch_dtype is None else grad_x
            found = partial.sum(0).unbind(0)
        kinds = (weight_dtype, bias_dtype, branch_bias_dtype)[:sums]
        found = [None if g is None else g.to(kind) for g, kind in zip(found, kinds, strict=True)]
        return grad_x, grad_branch, found[0], found[1], None, found[2] if sums == 3 else None, None, None
