"""Take rows of a sequence by index: MAE's shuffle and its unshuffle, each the other's gradient.

    out[b, m] = x[b, ids[b, m]]  if ids[b, m] < N  else  fill

B images, N rows in, M rows out, D channels. ``ids_keep`` (M < N) drops the masked patches; ``ids_restore`` (M > N) puts
the visible ones back, with ``fill``, the mask token, in the holes. Rows are copied, never computed on, so the kernel
equals its twin bit for bit. The gradient of the taking is the same taking along the inverse indices, so no atomics; that
of ``fill`` sums the holes in a fixed order. Source: He et al. 2021 (arXiv 2111.06377), section 3 "Simple implementation".
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmae.kernels.dispatch import use_triton


def take_rows(x: Tensor, ids: Tensor, inverse: Tensor, fill: Tensor | None = None) -> Tensor:
    """Rows ``ids`` of ``x``: (B, M, D) in the dtype that ``x`` and ``fill`` promote to; differentiable in both.

    ``x`` (B, N, D); ``ids`` (B, M) int32, an index >= N marks a hole; ``inverse`` (B, N) int32 is where each row of
    ``x`` goes (``ids[b, inverse[b, n]] == n``), an index >= M for nowhere; ``fill`` (D,), zeros when None.
    For the shuffle ids, inverse = ids_keep, ids_restore; for the unshuffle the other way round. No row may be taken
    twice. Raises ValueError on a wrong shape or dtype.
    """
    if x.ndim != 3:
        raise ValueError(f"x must be (B, N, D), got {tuple(x.shape)}")
    B, N, D = x.shape
    if ids.dtype != torch.int32 or ids.ndim != 2 or ids.shape[0] != B:
        raise ValueError(f"ids must be int32 ({B}, M), got {ids.dtype} {tuple(ids.shape)}")
    if inverse.dtype != torch.int32 or inverse.shape != (B, N):
        raise ValueError(f"inverse must be int32 {(B, N)}, got {inverse.dtype} {tuple(inverse.shape)}")
    if not x.device == ids.device == inverse.device:
        raise ValueError(f"x, ids and inverse must be on one device, got {x.device}, {ids.device} and {inverse.device}")
    if fill is not None:
        if fill.shape != (D,):
            raise ValueError(f"fill must be ({D},), got {tuple(fill.shape)}")
        dtype = torch.promote_types(x.dtype, fill.dtype)
        x, fill = x.to(dtype), fill.to(dtype)
    return _take_rows(x, ids, inverse, fill)


def take_rows_ref(x: Tensor, ids: Tensor, inverse: Tensor, fill: Tensor | None) -> Tensor:
    """The twin of ``take_rows``: the same arguments and bits, in plain torch."""
    N, D = x.shape[1:]
    is_hole = (ids >= N)[..., None]
    taken = torch.gather(x, 1, ids.clamp(max=N - 1).long()[..., None].expand(-1, -1, D))
    return torch.where(is_hole, taken.new_zeros(()) if fill is None else fill, taken)


def sum_holes_ref(grad: Tensor, ids: Tensor, rows: int) -> Tensor:
    """The twin of the fill's gradient: ``grad`` (B, M, D) summed where ``ids >= rows``, (D,)."""
    is_hole = (ids >= rows)[..., None]
    return torch.where(is_hole, grad, 0).sum((0, 1), dtype=torch.promote_types(grad.dtype, torch.float32)).to(grad.dtype)


@triton.jit
def _take_rows_fwd_kernel(out_ptr, x_ptr, ids_ptr, fill_ptr, N, M, D, HAS_FILL: tl.constexpr, BLOCK_D: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)  # one program per output row; int64 because B * M * D may pass 2**31
    d = tl.arange(0, BLOCK_D)
    source = tl.load(ids_ptr + row)
    if source < N:
        y = tl.load(x_ptr + (row // M * N + source) * D + d, mask=d < D)
    elif HAS_FILL:
        y = tl.load(fill_ptr + d, mask=d < D)
    else:
        y = tl.zeros([BLOCK_D], dtype=x_ptr.dtype.element_ty)
    tl.store(out_ptr + row * D + d, y, mask=d < D)


@triton.jit
def _sum_holes_kernel(partial_ptr, grad_ptr, ids_ptr, N, D, M: tl.constexpr, BLOCK_D: tl.constexpr):
    b = tl.program_id(0).to(tl.int64)  # one program per image and block of channels: its holes, summed in order
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_D], dtype=tl.float32)
    for m in range(M):
        is_hole = tl.load(ids_ptr + b * M + m) >= N
        total += tl.load(grad_ptr + (b * M + m) * D + d, mask=(d < D) & is_hole, other=0.0).to(tl.float32)
    tl.store(partial_ptr + b * D + d, total, mask=d < D)


def _take_rows_triton(x: Tensor, ids: Tensor, inverse: Tensor, fill: Tensor | None) -> Tensor:
    B, N, D = x.shape
    M = ids.shape[1]
    out = torch.empty(B, M, D, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    has_fill = fill is not None
    with torch.cuda.device_of(x):
        _take_rows_fwd_kernel[(B * M,)](
            out, x.contiguous(), ids.contiguous(), fill.contiguous() if has_fill else out, N, M, D,
            HAS_FILL=has_fill, BLOCK_D=triton.next_power_of_2(D),
        )  # fmt: skip
    return out


def _sum_holes_triton(grad: Tensor, ids: Tensor, rows: int) -> Tensor:
    B, M, D = grad.shape
    partial = torch.empty(B, D, dtype=torch.float32, device=grad.device)
    block = min(128, triton.next_power_of_2(D))
    if partial.numel():
        with torch.cuda.device_of(grad):
            _sum_holes_kernel[(B, triton.cdiv(D, block))](
                partial, grad.contiguous(), ids.contiguous(), rows, D, M=M, BLOCK_D=block
            )
    return partial.sum(0).to(grad.dtype)


@torch.library.custom_op("fastmae::take_rows", mutates_args=())
def _take_rows(x: Tensor, ids: Tensor, inverse: Tensor, fill: Tensor | None) -> Tensor:
    return (_take_rows_triton if use_triton(x) else take_rows_ref)(x, ids, inverse, fill)


@_take_rows.register_fake
def _(x, ids, inverse, fill):
    return x.new_empty(*ids.shape, x.shape[-1])


@torch.library.custom_op("fastmae::sum_holes", mutates_args=())
def _sum_holes(grad: Tensor, ids: Tensor, rows: int) -> Tensor:
    return (_sum_holes_triton if use_triton(grad) else sum_holes_ref)(grad, ids, rows)


@_sum_holes.register_fake
def _(grad, ids, rows):
    return grad.new_empty(grad.shape[-1])


def _save_for_backward(ctx, inputs, output):
    x, ids, inverse, fill = inputs
    ctx.save_for_backward(ids, inverse)
    ctx.rows, ctx.has_fill = x.shape[1], fill is not None


def _take_rows_backward(ctx, grad):
    ids, inverse = ctx.saved_tensors
    grad_x = _take_rows(grad, inverse, ids, None) if ctx.needs_input_grad[0] else None
    grad_fill = _sum_holes(grad, ids, ctx.rows) if ctx.has_fill and ctx.needs_input_grad[3] else None
    return grad_x, None, None, grad_fill


_take_rows.register_autograd(_take_rows_backward, setup_context=_save_for_backward)
