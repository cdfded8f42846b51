"""The decoder's input in one pass: embedded features of the visible patches, mask tokens for the others, positions on all.

    out[b, 0]         = x[b, 0]     + positions[0]                                 the class token
    out[b, 1 + k]     = x[b, 1 + k] + positions[1 + ids_keep[b, k]]
    out[b, 1 + K + q] = mask_token  + positions[1 + ids_predict[b, q]]

B images, K visible patches, Q predicted ones, L patches in all, D channels. Rows stay in shuffled order, which
makes no difference to the decoder's blocks: no unshuffle. Sums are taken in float32 and rounded once. The gradient of the mask
token sums its B Q rows in a fixed order, without atomics. Source: He et al. 2021 (arXiv 2111.06377), section 3 "MAE decoder".
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmae.kernels.dispatch import use_triton

_TILE = 2048  # values of the output that a program holds
_BWD_ROWS = 8  # rows that a program of the gradient holds at a time; twice as many spill


def decoder_input(
    x: Tensor, mask_token: Tensor, positions: Tensor, ids_keep: Tensor, ids_predict: Tensor, dtype: torch.dtype | None = None
) -> Tensor:
    """The sequence (B, 1 + K + Q, D) in ``dtype``, by default what the three inputs promote to.

    ``x`` (B, 1 + K, D), class token first; ``mask_token`` (D,); ``positions`` (1 + L, D), fixed; ``ids_keep`` (B, K) and
    ``ids_predict`` (B, Q) int32 in [0, L). Differentiable in ``x`` and ``mask_token``. Raises ValueError on a wrong shape
    or dtype, or on positions that ask for a gradient.
    """
    if x.ndim != 3 or x.shape[1] < 1:
        raise ValueError(f"x must be (B, 1 + K, D), got {tuple(x.shape)}")
    B, K, D = x.shape[0], x.shape[1] - 1, x.shape[2]
    if mask_token.shape != (D,) or positions.ndim != 2 or positions.shape[1] != D:
        raise ValueError(
            f"mask_token must be ({D},) and positions (1 + L, {D}), got {tuple(mask_token.shape)} and {tuple(positions.shape)}"
        )
    if ids_keep.dtype != torch.int32 or ids_keep.shape != (B, K):
        raise ValueError(f"ids_keep must be int32 {(B, K)}, got {ids_keep.dtype} {tuple(ids_keep.shape)}")
    if ids_predict.dtype != torch.int32 or ids_predict.ndim != 2 or ids_predict.shape[0] != B:
        raise ValueError(f"ids_predict must be int32 ({B}, Q), got {ids_predict.dtype} {tuple(ids_predict.shape)}")
    if positions.requires_grad:
        raise ValueError("decoder_input has no gradient for positions, which are a fixed table: pass positions.detach()")
    if any(t.device != x.device for t in (mask_token, positions, ids_keep, ids_predict)):
        raise ValueError(f"all inputs must be on the device of x, {x.device}")
    if dtype is None:
        dtype = torch.promote_types(torch.promote_types(x.dtype, mask_token.dtype), positions.dtype)
    return _decoder_input(x, mask_token, positions, ids_keep, ids_predict, dtype)


def decoder_input_ref(
    x: Tensor, mask_token: Tensor, positions: Tensor, ids_keep: Tensor, ids_predict: Tensor, dtype: torch.dtype
) -> Tensor:
    """The twin of ``decoder_input``: the same arguments and bits, in plain torch."""
    compute = torch.promote_types(dtype, torch.float32)
    x, mask_token, positions = (t.to(compute) for t in (x, mask_token, positions))
    cls_token, patches = x[:, :1] + positions[0], x[:, 1:] + positions[1:][ids_keep]
    return torch.cat([cls_token, patches, mask_token + positions[1:][ids_predict]], dim=1).to(dtype)


def decoder_input_bwd_ref(grad: Tensor, rows: int, x_dtype: torch.dtype, token_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The twin of the gradient: that of ``x``, the first ``rows`` of each sequence, and that of the mask token, the sum of
    the others."""
    grad_x = grad[:, :rows].to(x_dtype, copy=True, memory_format=torch.contiguous_format)
    return grad_x, grad[:, rows:].sum((0, 1), dtype=torch.promote_types(grad.dtype, torch.float32)).to(token_dtype)


@triton.jit
def _decoder_input_fwd_kernel(out_ptr, x_ptr, token_ptr, positions_ptr, keep_ptr, predict_ptr, K, Q, D,
                              BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)  # one program per BLOCK_M rows of one image; int64 because B M D may pass 2**31
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    M = 1 + K + Q
    is_visible = m <= K
    kept = tl.load(keep_ptr + b * K + m - 1, mask=is_visible & (m > 0), other=-1)
    predicted = tl.load(predict_ptr + b * Q + m - 1 - K, mask=(m > K) & (m < M), other=-1)
    row = 1 + tl.where(is_visible, kept, predicted)  # of the table, whose row 0 is the class token's
    inside = (m < M)[:, None] & (d < D)[None, :]
    x = tl.load(x_ptr + (b * (1 + K) + m)[:, None] * D + d[None, :], mask=inside & is_visible[:, None], other=0.0)
    token = tl.load(token_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    position = tl.load(positions_ptr + row.to(tl.int64)[:, None] * D + d[None, :], mask=inside, other=0.0).to(tl.float32)
    y = tl.where(is_visible[:, None], x.to(tl.float32), token[None, :]) + position
    tl.store(out_ptr + (b * M + m)[:, None] * D + d[None, :], y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _decoder_input_bwd_kernel(grad_x_ptr, partial_ptr, grad_ptr, rows, D,
                              M: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)  # one program per image and BLOCK_D channels: all rows, summed in order
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    for start in range(0, M, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        inside = (m < M)[:, None] & (d < D)[None, :]
        grad = tl.load(grad_ptr + (b * M + m)[:, None] * D + d[None, :], mask=inside, other=0.0).to(tl.float32)
        is_x = (m < rows)[:, None]
        x_ptrs = grad_x_ptr + (b * rows + m)[:, None] * D + d[None, :]
        tl.store(x_ptrs, grad.to(grad_x_ptr.dtype.element_ty), mask=inside & is_x)
        total += tl.where(is_x, 0.0, grad)
    tl.store(partial_ptr + b * D + d, tl.sum(total, 0), mask=d < D)


def _decoder_input_triton(
    x: Tensor, mask_token: Tensor, positions: Tensor, ids_keep: Tensor, ids_predict: Tensor, dtype: torch.dtype
) -> Tensor:
    B, K, D = x.shape[0], x.shape[1] - 1, x.shape[2]
    Q = ids_predict.shape[1]
    out = torch.empty(B, 1 + K + Q, D, dtype=dtype, device=x.device)
    block_d = triton.next_power_of_2(D)
    block_m = max(1, _TILE // block_d)
    if out.numel():
        with torch.cuda.device_of(x):
            _decoder_input_fwd_kernel[(B, triton.cdiv(1 + K + Q, block_m))](
                out, x.contiguous(), mask_token.contiguous(), positions.contiguous(), ids_keep.contiguous(),
                ids_predict.contiguous(), K, Q, D, BLOCK_M=block_m, BLOCK_D=block_d,
            )  # fmt: skip
    return out


def _decoder_input_bwd_triton(grad: Tensor, rows: int, x_dtype: torch.dtype, token_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    B, M, D = grad.shape
    grad_x = torch.empty(B, rows, D, dtype=x_dtype, device=grad.device)
    partial = torch.empty(B, D, dtype=torch.float32, device=grad.device)
    block_d = min(128, triton.next_power_of_2(D))
    if partial.numel():
        with torch.cuda.device_of(grad):
            _decoder_input_bwd_kernel[(B, triton.cdiv(D, block_d))](
                grad_x, partial, grad.contiguous(), rows, D, M=M, BLOCK_M=_BWD_ROWS, BLOCK_D=block_d
            )
    return grad_x, partial.sum(0).to(token_dtype)


@torch.library.custom_op("fastmae::decoder_input", mutates_args=())
def _decoder_input(
    x: Tensor, mask_token: Tensor, positions: Tensor, ids_keep: Tensor, ids_predict: Tensor, dtype: torch.dtype
) -> Tensor:
    by_kernel = use_triton(x) and dtype != torch.float64
    body = _decoder_input_triton if by_kernel else decoder_input_ref
    return body(x, mask_token, positions, ids_keep, ids_predict, dtype)


@_decoder_input.register_fake
def _(x, mask_token, positions, ids_keep, ids_predict, dtype):
    return x.new_empty(x.shape[0], x.shape[1] + ids_predict.shape[1], x.shape[2], dtype=dtype)


@torch.library.custom_op("fastmae::decoder_input_bwd", mutates_args=())
def _decoder_input_bwd(grad: Tensor, rows: int, x_dtype: torch.dtype, token_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    by_kernel = use_triton(grad) and x_dtype != torch.float64
    body = _decoder_input_bwd_triton if by_kernel else decoder_input_bwd_ref
    return body(grad, rows, x_dtype, token_dtype)


@_decoder_input_bwd.register_fake
def _(grad, rows, x_dtype, token_dtype):
    B, _, D = grad.shape
    return grad.new_empty(B, rows, D, dtype=x_dtype), grad.new_empty(D, dtype=token_dtype)


def _save_for_backward(ctx, inputs, output):
    x, mask_token, *_ = inputs
    ctx.rows, ctx.x_dtype, ctx.token_dtype = x.shape[1], x.dtype, mask_token.dtype


def _decoder_input_backward(ctx, grad):
    return *_decoder_input_bwd(grad, ctx.rows, ctx.x_dtype, ctx.token_dtype), None, None, None, None


_decoder_input.register_autograd(_decoder_input_backward, setup_context=_save_for_backward)
