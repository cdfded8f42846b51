"""Attention over short sequences: packed q, k, v in, their packed gradient out, and the whole of a head on one multiprocessor.

    s[n, m] = q[b, n, h] . k[b, m, h] / sqrt(d),   m < keys[b];      out[b, n, h] = sum_m softmax_m(s[n, m]) v[b, m, h]

B images, N queries, M keys, H heads of d channels. One program owns one head of one image: blocks of queries are its rows, and
keys and values, read from memory once and from the cache then, pass by in tiles. The softmax is float32, in base 2; what the
gradient needs of it is kept as ``lse[b, h, n] = log2(sum_m exp(s[n, m]))``. The gradient is in ``short_attention_bwd``.
Source: Dao 2023 (arXiv 2307.08691), section 3.1.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmae.kernels.attention_tiles import dense, forward_tiles, load_rows, store_rows, width
from fastmae.kernels.dispatch import use_triton
from fastmae.kernels.short_attention_bwd import masked_scores, short_attention_bwd, wide_parts

MOST_TOKENS, MOST_CHANNELS = 320, 128
_LOG2_E = math.log2(math.e)


def short_attention(packed: Tensor, q: Tensor | None = None, bias: Tensor | None = None, keys: Tensor | None = None) -> Tensor:
    """Attention within ``packed`` (B, M, 3, H, d), which holds q, k, v; or of ``q`` (B, N, H, d) over the k, v of ``packed``
    (B, M, 2, H, d). Returns (B, N, H, d) in the same dtype. Any strides. Gradients: ``packed``, ``q``, ``bias``.

    ``bias`` (3 H d,), of q, k and v: it is *not* added, for the linear layer before has added it, detached. It only receives
    its gradient, the sum over images and tokens, so that no further pass over the tokens' gradients is needed. That of k's bias
    is 0: it shifts all scores of a query alike, which a softmax ignores.
    ``keys`` (B,) int32: how many keys each image has, 1 to M; the rest are neither read nor given a gradient. None: all.
    Raises ValueError on a wrong shape or dtype, on more than 320 tokens, and on heads of more than 128 channels.
    """
    _check(packed, q, bias, keys)
    return _short_attention(packed, q, bias, keys)[0]


def short_attention_ref(packed: Tensor, q: Tensor | None, bias: Tensor | None, keys: Tensor | None) -> tuple[Tensor, Tensor]:
    """The twin of the forward op, in plain torch: out (B, N, H, d) and lse (B, H, N)."""
    q, k, v = wide_parts(packed, q, keys)
    with torch.autocast(packed.device.type, enabled=False):  # it would round the products
        scores = masked_scores(q, k, keys)
        out = scores.softmax(-1) @ v
    return out.transpose(1, 2).contiguous().to(packed.dtype), scores.logsumexp(-1) * _LOG2_E


def _check(packed: Tensor, q: Tensor | None, bias: Tensor | None, keys: Tensor | None) -> None:
    parts = 3 if q is None else 2
    if packed.ndim != 5 or packed.shape[2] != parts or not packed.is_floating_point():
        wanted = f"packed must be floating point (B, M, {parts}, H, d) {'without' if q is None else 'with'} q"
        raise ValueError(f"{wanted}, got {packed.dtype} {tuple(packed.shape)}")
    B, M, _, H, d = packed.shape
    if q is not None and (q.ndim != 4 or (q.shape[0], *q.shape[2:]) != (B, H, d) or q.dtype != packed.dtype):
        raise ValueError(f"q must be {packed.dtype} ({B}, N, {H}, {d}), got {q.dtype} {tuple(q.shape)}")
    if bias is not None and (bias.shape != (3 * H * d,) or not bias.is_floating_point()):
        raise ValueError(f"bias must be floating point ({3 * H * d},), got {bias.dtype} {tuple(bias.shape)}")
    if keys is not None and (keys.shape != (B,) or keys.dtype != torch.int32):
        raise ValueError(f"keys must be int32 ({B},), got {keys.dtype} {tuple(keys.shape)}")
    N = M if q is None else q.shape[1]
    if not (1 <= M <= MOST_TOKENS and 1 <= N <= MOST_TOKENS and 1 <= d <= MOST_CHANNELS):
        limits = f"1 to {MOST_TOKENS} tokens and {MOST_CHANNELS} channels"
        raise ValueError(f"short_attention takes {limits}, got {N} queries, {M} keys, {d} channels: use another backend")


@triton.jit
def _attend(out_ptr, lse_ptr, q_ptr, k_ptr, v_ptr, first, keys, stride_out, stride_qn, stride_km,
            SCALE: tl.constexpr, N: tl.constexpr, M: tl.constexpr, D: tl.constexpr,
            ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """``ROWS`` queries from ``first`` on, over all keys."""
    q = load_rows(q_ptr, first, N, stride_qn, D, ROWS, BLOCK_D)
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    top = tl.full([ROWS], float("-inf"), tl.float32)  # the greatest score so far, finite from the first tile on
    total = tl.zeros([ROWS], tl.float32)
    for m in range(0, M, COLUMNS):
        k = load_rows(k_ptr, m, keys, stride_km, D, COLUMNS, BLOCK_D)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * SCALE
        s = tl.where((m + tl.arange(0, COLUMNS) < keys)[None, :], s, float("-inf"))
        greatest = tl.maximum(top, tl.max(s, 1))
        p = tl.exp2(s - greatest[:, None])
        shrink = tl.exp2(top - greatest)
        total = total * shrink + tl.sum(p, 1)
        v = load_rows(v_ptr, m, keys, stride_km, D, COLUMNS, BLOCK_D)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        top = greatest
    store_rows(out_ptr, acc / total[:, None], first, N, stride_out, D, ROWS, BLOCK_D)
    n = first + tl.arange(0, ROWS)
    tl.store(lse_ptr + n, top + tl.log2(total), mask=n < N)


@triton.jit
def _short_attention_fwd_kernel(out_ptr, lse_ptr, q_ptr, k_ptr, v_ptr, keys_ptr, H, stride_out,
                                stride_qb, stride_qn, stride_qh, stride_kb, stride_km, stride_kh,
                                SCALE: tl.constexpr, N: tl.constexpr, M: tl.constexpr, D: tl.constexpr,
                                HAS_KEYS: tl.constexpr, BLOCKS: tl.constexpr, ROWS: tl.constexpr, TAIL: tl.constexpr,
                                COLUMNS: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)  # one per image and head; int64 because B * N * H * d may pass 2**31
    b, h = program // H, program % H
    out_ptr += b * N * stride_out + h * D
    lse_ptr += program * N
    q_ptr += b * stride_qb + h * stride_qh
    k_ptr += b * stride_kb + h * stride_kh
    v_ptr += b * stride_kb + h * stride_kh
    keys = M
    if HAS_KEYS:
        keys = tl.minimum(tl.load(keys_ptr + b), M)
    for block in range(BLOCKS):
        _attend(out_ptr, lse_ptr, q_ptr, k_ptr, v_ptr, block * ROWS, keys, stride_out, stride_qn, stride_km,
                SCALE, N, M, D, ROWS, COLUMNS, BLOCK_D)  # fmt: skip
    if TAIL > 0:
        _attend(out_ptr, lse_ptr, q_ptr, k_ptr, v_ptr, BLOCKS * ROWS, keys, stride_out, stride_qn, stride_km,
                SCALE, N, M, D, TAIL, COLUMNS, BLOCK_D)  # fmt: skip


def _short_attention_triton(
    packed: Tensor, q: Tensor | None, bias: Tensor | None, keys: Tensor | None
) -> tuple[Tensor, Tensor]:
    q, k, v = packed.unbind(2) if q is None else (q, *packed.unbind(2))
    (B, N, H, d), M = q.shape, k.shape[1]
    out = torch.empty(B, N, H, d, dtype=q.dtype, device=q.device)
    lse = torch.empty(B, H, N, dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    tiles = forward_tiles(N, M, d, q.itemsize)
    with torch.cuda.device_of(q):
        _short_attention_fwd_kernel[(B * H,)](
            out, lse, q, k, v, lse if keys is None else keys, H, H * d, *q.stride()[:3], *k.stride()[:3],
            SCALE=_LOG2_E * d**-0.5, N=N, M=M, D=d, HAS_KEYS=keys is not None, BLOCKS=tiles.blocks, ROWS=tiles.rows,
            TAIL=tiles.tail, COLUMNS=tiles.columns, BLOCK_D=width(d), num_warps=tiles.warps, num_stages=1,
            maxnreg=tiles.registers,
        )  # fmt: skip
    return out, lse


@torch.library.custom_op("fastmae::short_attention", mutates_args=())
def _short_attention(packed: Tensor, q: Tensor | None, bias: Tensor | None, keys: Tensor | None) -> tuple[Tensor, Tensor]:
    body = _short_attention_triton if use_triton(packed) else short_attention_ref
    return body(dense(packed), dense(q), bias, dense(keys))


@_short_attention.register_fake
def _(packed, q, bias, keys):
    B, M, _, H, d = packed.shape
    N = M if q is None else q.shape[1]
    lse = packed.new_empty(B, H, N, dtype=torch.promote_types(packed.dtype, torch.float32))
    return packed.new_empty(B, N, H, d), lse


def _save_for_backward(ctx, inputs, output):
    packed, q, bias, keys = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(packed, q, keys, out, lse)


def _short_attention_backward(ctx, grad_out, _):
    packed, q, keys, out, lse = ctx.saved_tensors
    wants_bias = ctx.needs_input_grad[2]
    grad_packed, grad_q, sums = short_attention_bwd(grad_out, packed, q, keys, out, lse, wants_bias)
    grad_bias = None
    if wants_bias:
        of_q, of_v = sums.sum(0).unbind(0)
        grad_bias = torch.cat([of_q, torch.zeros_like(of_q), of_v]).to(ctx.bias_dtype)
    return grad_packed, None if q is None else grad_q, grad_bias, None


_short_attention.register_autograd(_short_attention_backward, setup_context=_save_for_backward)
