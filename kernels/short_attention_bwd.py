"""The gradient of ``short_attention``: of packed q, k, v in one tensor, and the sums over tokens that their bias receives.

    p[n, m] = 2^(s[n, m] log2(e) - lse[n]),   delta[n] = do[n] . out[n],   ds[n, m] = p[n, m] (do[n] . v[m] - delta[n])
    dv[m] = sum_n p[n, m] do[n],   dk[m] = sum_n ds[n, m] q[n] / sqrt(d),   dq[n] = sum_m ds[n, m] k[m] / sqrt(d)

Letters as in ``short_attention``, ``do`` the gradient of ``out``. One program owns one head of one image, so nothing is added
up across programs. Up to 64 tokens and channels (32 in float32) everything is one tile, and p and ds are computed once. Above,
registers do not hold the gradients of all keys: both are computed twice, for blocks of queries and then for blocks of keys.
Sums for the bias: rows of p sum to 1 and rows of ds to 0, so the sum of dv over keys is that of ``do``, and that of dk is 0.
Source: Dao 2023 (arXiv 2307.08691), section 3.2, without its atomic additions.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmae.kernels.attention_tiles import backward_tiles, dense, is_single, load_rows, store_rows, width
from fastmae.kernels.dispatch import use_triton


def short_attention_bwd(
    grad_out: Tensor, packed: Tensor, q: Tensor | None, keys: Tensor | None, out: Tensor, lse: Tensor, wants_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of packed, contiguous, and of q (empty if q is None), in their dtype; and, if wanted, the sums over tokens of
    the gradients of q and v, (B, 2, H d) in the dtype of lse, else empty."""
    return _short_attention_bwd(grad_out, packed, q, keys, out, lse, wants_bias)


def short_attention_bwd_ref(
    grad_out: Tensor, packed: Tensor, q: Tensor | None, keys: Tensor | None, out: Tensor, lse: Tensor, wants_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The twin of the backward op, in plain torch."""
    q_, k, v = wide_parts(packed, q, keys)
    do, o = (x.to(lse.dtype).transpose(1, 2) for x in (grad_out, out))  # (B, H, N, d)
    scale = q_.shape[-1] ** -0.5
    with torch.autocast(packed.device.type, enabled=False):  # it would round the products
        p = masked_scores(q_, k, keys).softmax(-1)
        ds = p * (do @ v.mT - (do * o).sum(-1, keepdim=True))
        grads = [x.transpose(1, 2) for x in (ds @ k * scale, ds.mT @ q_ * scale, p.mT @ do)]  # (B, N or M, H, d)
    sums = torch.stack([grads[0].sum(1), do.sum(2)], 1).flatten(2) if wants_bias else lse.new_empty(0)
    if q is None:
        return torch.stack(grads, 2).to(packed.dtype), packed.new_empty(0), sums
    return torch.stack(grads[1:], 2).to(packed.dtype), grads[0].contiguous().to(q.dtype), sums


def wide_parts(packed: Tensor, q: Tensor | None, keys: Tensor | None) -> list[Tensor]:
    """q (B, H, N, d), k, v (B, H, M, d) in float32 or float64; k and v are 0 where an image has no key."""
    dtype = torch.promote_types(packed.dtype, torch.float32)
    q, *rest = (x.to(dtype).transpose(1, 2) for x in (packed.unbind(2) if q is None else (q, *packed.unbind(2))))
    return [q, *(rest if keys is None else (x.masked_fill(_has_no_key(x, keys)[..., None], 0) for x in rest))]


def masked_scores(q: Tensor, k: Tensor, keys: Tensor | None) -> Tensor:
    """Of q (B, H, N, d) and k (B, H, M, d): (B, H, N, M), -inf where an image has no key."""
    scores = q * q.shape[-1] ** -0.5 @ k.mT
    return scores if keys is None else scores.masked_fill(_has_no_key(k, keys)[..., None, :], -math.inf)


def _has_no_key(k: Tensor, keys: Tensor) -> Tensor:
    return torch.arange(k.shape[2], device=k.device) >= keys[:, None, None]  # (B, 1, M)


@triton.jit
def _power(x, y, lse, is_key, SCALE: tl.constexpr):
    """Probabilities: of queries by keys, or of keys by queries."""
    p = tl.exp2(tl.dot(x, tl.trans(y), input_precision="ieee") * SCALE - lse)
    return tl.where(is_key, p, 0.0)


@triton.jit
def _grad_queries(dq_ptr, delta_ptr, do_ptr, q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, sum_q, sum_v, first, keys,
                  stride_dq, stride_out, stride_qn, stride_km, N, M, SCALE: tl.constexpr, GRAD: tl.constexpr,
                  D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
                  BLOCK_D: tl.constexpr):  # fmt: skip
    """The gradient of ``ROWS`` queries from ``first`` on, their delta, and what they add to the sums."""
    n = first + tl.arange(0, ROWS)
    do = load_rows(do_ptr, first, N, stride_out, D, ROWS, BLOCK_D)
    out = load_rows(out_ptr, first, N, stride_out, D, ROWS, BLOCK_D)
    delta = tl.sum(out.to(tl.float32) * do.to(tl.float32), 1)
    tl.store(delta_ptr + n, delta, mask=n < N)
    sum_v += tl.sum(do.to(tl.float32), 0)
    lse = tl.load(lse_ptr + n, mask=n < N, other=float("inf"))
    q = load_rows(q_ptr, first, N, stride_qn, D, ROWS, BLOCK_D)
    dq = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for m in range(0, M, COLUMNS):
        k = load_rows(k_ptr, m, keys, stride_km, D, COLUMNS, BLOCK_D)
        p = _power(q, k, lse[:, None], (m + tl.arange(0, COLUMNS) < keys)[None, :], SCALE)
        v = load_rows(v_ptr, m, keys, stride_km, D, COLUMNS, BLOCK_D)
        ds = p * (tl.dot(do, tl.trans(v), input_precision="ieee") - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    dq *= GRAD
    store_rows(dq_ptr, dq, first, N, stride_dq, D, ROWS, BLOCK_D)
    return sum_q + tl.sum(dq, 0), sum_v


@triton.jit
def _grad_keys(dk_ptr, dv_ptr, delta_ptr, do_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, first, keys,
               stride_dk, stride_out, stride_qn, stride_km, N, M, SCALE: tl.constexpr, GRAD: tl.constexpr,
               D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
               BLOCK_D: tl.constexpr):  # fmt: skip
    """The gradients of ``ROWS`` keys and values from ``first`` on."""
    is_key = (first + tl.arange(0, ROWS) < keys)[:, None]
    k = load_rows(k_ptr, first, keys, stride_km, D, ROWS, BLOCK_D)
    v = load_rows(v_ptr, first, keys, stride_km, D, ROWS, BLOCK_D)
    dk = tl.zeros([ROWS, BLOCK_D], tl.float32)
    dv = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for start in range(0, N, COLUMNS):
        n = start + tl.arange(0, COLUMNS)
        q = load_rows(q_ptr, start, N, stride_qn, D, COLUMNS, BLOCK_D)
        lse = tl.load(lse_ptr + n, mask=n < N, other=float("inf"))
        p = _power(k, q, lse[None, :], is_key, SCALE)
        do = load_rows(do_ptr, start, N, stride_out, D, COLUMNS, BLOCK_D)
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
        delta = tl.load(delta_ptr + n, mask=n < N, other=0.0)
        ds = p * (tl.dot(v, tl.trans(do), input_precision="ieee") - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    store_rows(dk_ptr, dk * GRAD, first, M, stride_dk, D, ROWS, BLOCK_D)
    store_rows(dv_ptr, dv, first, M, stride_dk, D, ROWS, BLOCK_D)


@triton.jit(do_not_specialize=["N", "M", "blocks_q", "blocks_k"])
def _short_attention_bwd_kernel(dq_ptr, dk_ptr, dv_ptr, sums_ptr, delta_ptr, do_ptr, q_ptr, k_ptr, v_ptr, keys_ptr, out_ptr,
                                lse_ptr, N, M, H, stride_dq, stride_dk, stride_out,
                                stride_qb, stride_qn, stride_qh, stride_kb, stride_km, stride_kh, blocks_q, blocks_k,
                                SCALE: tl.constexpr, GRAD: tl.constexpr, D: tl.constexpr, HAS_KEYS: tl.constexpr,
                                HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, TAIL_Q: tl.constexpr, TAIL_K: tl.constexpr,
                                COLUMNS_Q: tl.constexpr, COLUMNS_K: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)  # one per image and head; int64 because B * N * H * d may pass 2**31
    b, h = program // H, program % H
    dq_ptr += b * N * stride_dq + h * D
    dk_ptr += b * M * stride_dk + h * D
    dv_ptr += b * M * stride_dk + h * D
    delta_ptr += program * N
    do_ptr += b * N * stride_out + h * D
    q_ptr += b * stride_qb + h * stride_qh
    k_ptr += b * stride_kb + h * stride_kh
    v_ptr += b * stride_kb + h * stride_kh
    out_ptr += b * N * stride_out + h * D
    lse_ptr += program * N
    keys = M
    if HAS_KEYS:
        keys = tl.minimum(tl.load(keys_ptr + b), M)
    sum_q = tl.zeros([BLOCK_D], tl.float32)
    sum_v = tl.zeros([BLOCK_D], tl.float32)
    for block in range(blocks_q):
        sum_q, sum_v = _grad_queries(
            dq_ptr, delta_ptr, do_ptr, q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, sum_q, sum_v, block * ROWS, keys,
            stride_dq, stride_out, stride_qn, stride_km, N, M, SCALE, GRAD, D, ROWS, COLUMNS_K, BLOCK_D)  # fmt: skip
    if TAIL_Q > 0:
        sum_q, sum_v = _grad_queries(
            dq_ptr, delta_ptr, do_ptr, q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, sum_q, sum_v, blocks_q * ROWS, keys,
            stride_dq, stride_out, stride_qn, stride_km, N, M, SCALE, GRAD, D, TAIL_Q, COLUMNS_K, BLOCK_D)  # fmt: skip
    if HAS_BIAS:
        d = tl.arange(0, BLOCK_D)
        tl.store(sums_ptr + (b * 2 * H + h) * D + d, sum_q, mask=d < D)
        tl.store(sums_ptr + (b * 2 * H + H + h) * D + d, sum_v, mask=d < D)
    tl.debug_barrier()  # other threads of this program have stored the delta that is read now
    for block in range(blocks_k):
        _grad_keys(dk_ptr, dv_ptr, delta_ptr, do_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, block * ROWS, keys,
                   stride_dk, stride_out, stride_qn, stride_km, N, M, SCALE, GRAD, D, ROWS, COLUMNS_Q, BLOCK_D)  # fmt: skip
    if TAIL_K > 0:
        _grad_keys(dk_ptr, dv_ptr, delta_ptr, do_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, blocks_k * ROWS, keys,
                   stride_dk, stride_out, stride_qn, stride_km, N, M, SCALE, GRAD, D, TAIL_K, COLUMNS_Q, BLOCK_D)  # fmt: skip


@triton.jit
def _short_attention_bwd_single_kernel(dq_ptr, dk_ptr, dv_ptr, sums_ptr, do_ptr, q_ptr, k_ptr, v_ptr, keys_ptr, out_ptr,
                                       lse_ptr, H, stride_dq, stride_dk, stride_out,
                                       stride_qb, stride_qn, stride_qh, stride_kb, stride_km, stride_kh,
                                       SCALE: tl.constexpr, GRAD: tl.constexpr, N: tl.constexpr, M: tl.constexpr,
                                       D: tl.constexpr, HAS_KEYS: tl.constexpr, HAS_BIAS: tl.constexpr,
                                       BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)  # one per image and head; int64 because B * N * H * d may pass 2**31
    b, h = program // H, program % H
    do_ptr += b * N * stride_out + h * D
    q_ptr += b * stride_qb + h * stride_qh
    k_ptr += b * stride_kb + h * stride_kh
    v_ptr += b * stride_kb + h * stride_kh
    out_ptr += b * N * stride_out + h * D
    keys = M
    if HAS_KEYS:
        keys = tl.minimum(tl.load(keys_ptr + b), M)
    n, d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    # Each input is loaded where it is used first, and each result stored at once: fewer registers.
    k = load_rows(k_ptr, 0, keys, stride_km, D, BLOCK_M, BLOCK_D)
    q = load_rows(q_ptr, 0, N, stride_qn, D, BLOCK_N, BLOCK_D)
    lse = tl.load(lse_ptr + program * N + n, mask=n < N, other=float("inf"))
    p = _power(k, q, lse[None, :], (tl.arange(0, BLOCK_M) < keys)[:, None], SCALE)
    do = load_rows(do_ptr, 0, N, stride_out, D, BLOCK_N, BLOCK_D)
    out = load_rows(out_ptr, 0, N, stride_out, D, BLOCK_N, BLOCK_D)
    delta = tl.sum(out.to(tl.float32) * do.to(tl.float32), 1)
    if HAS_BIAS:
        tl.store(sums_ptr + (b * 2 * H + H + h) * D + d, tl.sum(do.to(tl.float32), 0), mask=d < D)
    dv = tl.dot(p.to(do.dtype), do, input_precision="ieee")
    store_rows(dv_ptr + b * M * stride_dk + h * D, dv, 0, M, stride_dk, D, BLOCK_M, BLOCK_D)
    v = load_rows(v_ptr, 0, keys, stride_km, D, BLOCK_M, BLOCK_D)
    ds = (p * (tl.dot(v, tl.trans(do), input_precision="ieee") - delta[None, :])).to(q.dtype)
    dk = tl.dot(ds, q, input_precision="ieee") * GRAD
    store_rows(dk_ptr + b * M * stride_dk + h * D, dk, 0, M, stride_dk, D, BLOCK_M, BLOCK_D)
    dq = tl.dot(tl.trans(ds), k, input_precision="ieee") * GRAD
    store_rows(dq_ptr + b * N * stride_dq + h * D, dq, 0, N, stride_dq, D, BLOCK_N, BLOCK_D)
    if HAS_BIAS:
        tl.store(sums_ptr + (b * 2 * H + h) * D + d, tl.sum(dq, 0), mask=d < D)


def _short_attention_bwd_triton(
    grad_out: Tensor, packed: Tensor, q: Tensor | None, keys: Tensor | None, out: Tensor, lse: Tensor, wants_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    grad_packed, grad_q, sums = _outputs(packed, q, lse, wants_bias)
    grads = grad_packed.unbind(2) if q is None else (grad_q, *grad_packed.unbind(2))
    q, k, v = packed.unbind(2) if q is None else (q, *packed.unbind(2))
    (B, N, H, d), M = q.shape, k.shape[1]
    if q.numel() == 0:
        return grad_packed, grad_q, sums
    inputs = grad_out, q, k, v, lse if keys is None else keys, out, lse
    strides = H, grads[0].stride(1), grads[1].stride(1), H * d, *q.stride()[:3], *k.stride()[:3]
    constants = {
        "SCALE": math.log2(math.e) * d**-0.5, "GRAD": d**-0.5, "D": d, "HAS_KEYS": keys is not None, "HAS_BIAS": wants_bias,
        "BLOCK_D": width(d), "num_stages": 1,
    }  # fmt: skip
    with torch.cuda.device_of(q):
        if is_single(N, M, d, q.itemsize):
            _short_attention_bwd_single_kernel[(B * H,)](
                *grads, sums, *inputs, *strides, **constants, N=N, M=M, BLOCK_N=width(N), BLOCK_M=width(M),
                num_warps=2 * q.itemsize, maxnreg=255 if q.itemsize == 4 else None,
            )  # fmt: skip
        else:
            by_query, by_key = backward_tiles(N, M, d, q.itemsize), backward_tiles(M, N, d, q.itemsize)
            _short_attention_bwd_kernel[(B * H,)](
                *grads, sums, torch.empty_like(lse), *inputs, N, M, *strides, by_query.blocks, by_key.blocks, **constants,
                ROWS=by_key.rows, TAIL_Q=by_query.tail, TAIL_K=by_key.tail, COLUMNS_Q=by_key.columns,
                COLUMNS_K=by_query.columns, num_warps=by_key.warps, maxnreg=by_key.registers,
            )  # fmt: skip
    return grad_packed, grad_q, sums


def _outputs(packed: Tensor, q: Tensor | None, lse: Tensor, wants_bias: bool) -> tuple[Tensor, Tensor, Tensor]:
    B, _, _, H, d = packed.shape
    grad_packed = torch.empty_like(packed, memory_format=torch.contiguous_format)
    grad_q = packed.new_empty(0) if q is None else torch.empty_like(q, memory_format=torch.contiguous_format)
    return grad_packed, grad_q, lse.new_empty((B, 2, H * d) if wants_bias else 0)


@torch.library.custom_op("fastmae::short_attention_bwd", mutates_args=())
def _short_attention_bwd(
    grad_out: Tensor, packed: Tensor, q: Tensor | None, keys: Tensor | None, out: Tensor, lse: Tensor, wants_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    body = _short_attention_bwd_triton if use_triton(packed) else short_attention_bwd_ref
    return body(grad_out.contiguous(), dense(packed), dense(q), dense(keys), out, lse, wants_bias)


@_short_attention_bwd.register_fake
def _(grad_out, packed, q, keys, out, lse, wants_bias):
    return _outputs(packed, q, lse, wants_bias)
