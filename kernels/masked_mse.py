"""Mean squared error of predicted patches against their pixels; the target is built in registers and never stored.

    t[b, q, (u, v, c)] = pixel(b, c, y p + u, x p + v),            (y, x) = divmod(ids[b, q], W / p)
    with norm_pix:  t <- (t - mean_P(t)) / sqrt(var_P(t) + 1e-6),  var unbiased (P - 1)
    rows[b, q] = mean_P((pred[b, q] - t[b, q])**2),                loss = mean(rows)

B images, Q predicted patches of each, P = C p p values in a patch, channel *fastest*: the order of the decoder's head.
Statistics run over all P values of a patch jointly. Everything is computed in float32. The forward pass keeps two floats
per patch (mean, 1/std); the backward pass rebuilds the target from them. No atomics: sums have a fixed order.
Source: He et al. 2021 (arXiv 2111.06377), section 3 "Reconstruction target".
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmae.kernels.dispatch import use_triton, warps
from fastmae.kernels.patches import check_images, load_patch, patch_pixels

EPS = 1e-6  # added to a patch's variance


def masked_mse(
    pred: Tensor,
    images: Tensor,
    ids: Tensor,
    patch_size: int,
    norm_pix: bool,
    mean: Tensor | None = None,
    std: Tensor | None = None,
) -> Tensor:
    """The loss, a float32 scalar (float64 for float64 ``pred``), differentiable in ``pred``.

    ``pred`` (B, Q, P) floating point, channel fastest; ``images``, ``ids`` (B, Q), ``mean`` and ``std`` as in
    ``gather_patches``. Raises ValueError on a wrong shape or dtype, or on images that ask for a gradient.
    """
    check_images(images, ids, patch_size, mean, std)
    P = images.shape[1] * patch_size**2
    if pred.shape != (*ids.shape, P) or not pred.is_floating_point():
        raise ValueError(f"pred must be floating point {(*ids.shape, P)}, got {pred.dtype} {tuple(pred.shape)}")
    if images.requires_grad:
        raise ValueError("masked_mse has no gradient for images: pass images.detach()")
    if norm_pix and P < 2:
        raise ValueError("norm_pix needs patches of at least 2 values: the variance of one value is undefined")
    return _masked_mse(pred, images, ids, patch_size, norm_pix, mean, std)[0].mean()


def masked_mse_ref(
    pred: Tensor, images: Tensor, ids: Tensor, patch_size: int, norm_pix: bool, mean: Tensor | None, std: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The twin of the forward op: rows (B, Q), patch means (B, Q) and inverse deviations (B, Q), in plain torch."""
    target = _target(images, ids, patch_size, mean, std).to(_compute_dtype(pred))
    if norm_pix:
        variance, center = torch.var_mean(target, dim=-1, correction=1)
        rstd = (variance + EPS).rsqrt()
    else:
        center, rstd = target.new_zeros(ids.shape), target.new_ones(ids.shape)
    rows = (pred - (target - center[..., None]) * rstd[..., None]).square().mean(-1)
    return rows, center, rstd


def masked_mse_bwd_ref(
    grad_rows: Tensor, pred: Tensor, images: Tensor, ids: Tensor, center: Tensor, rstd: Tensor, patch_size: int,
    mean: Tensor | None, std: Tensor | None,
) -> Tensor:  # fmt: skip
    """The twin of the backward op: the gradient of ``pred`` from that of the rows."""
    target = _target(images, ids, patch_size, mean, std)
    error = pred - (target - center[..., None]) * rstd[..., None]
    return (error * (grad_rows * (2 / pred.shape[-1]))[..., None]).to(pred.dtype)


def _target(images: Tensor, ids: Tensor, patch_size: int, mean: Tensor | None, std: Tensor | None) -> Tensor:
    return patch_pixels(images, ids, patch_size, mean, std).permute(0, 1, 3, 4, 2).flatten(2)  # (B, Q, p p C)


def _compute_dtype(pred: Tensor) -> torch.dtype:
    return torch.promote_types(pred.dtype, torch.float32)


@triton.jit
def _load_target(images_ptr, ids_ptr, mean_ptr, std_ptr, row, i, inside, Q, columns, stride_b, stride_c, stride_y, stride_x,
                 C: tl.constexpr, PATCH: tl.constexpr, IS_BYTES: tl.constexpr):  # fmt: skip
    """Pixels ``i`` of the patch that row ``row`` predicts, in the prediction's order: channel fastest."""
    u, v, c = i // (PATCH * C), i // C % PATCH, i % C
    patch = tl.load(ids_ptr + row)
    return load_patch(images_ptr, mean_ptr, std_ptr, row // Q, patch, c, u, v, columns,
                      stride_b, stride_c, stride_y, stride_x, inside, PATCH, IS_BYTES)  # fmt: skip


@triton.jit
def _masked_mse_fwd_kernel(rows_ptr, center_ptr, rstd_ptr, pred_ptr, images_ptr, ids_ptr, mean_ptr, std_ptr, Q, columns,
                           stride_b, stride_c, stride_y, stride_x,
                           EPS: tl.constexpr, C: tl.constexpr, PATCH: tl.constexpr, NORM_PIX: tl.constexpr,
                           IS_BYTES: tl.constexpr, BLOCK_P: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)  # one program per predicted patch; int64 because B * Q * P may pass 2**31
    i = tl.arange(0, BLOCK_P)
    P = C * PATCH * PATCH
    inside = i < P
    target = _load_target(images_ptr, ids_ptr, mean_ptr, std_ptr, row, i, inside, Q, columns,
                          stride_b, stride_c, stride_y, stride_x, C, PATCH, IS_BYTES)  # fmt: skip
    center = 0.0
    rstd = 1.0
    if NORM_PIX:
        center = tl.sum(tl.where(inside, target, 0.0)) / P
        deviation = tl.where(inside, target - center, 0.0)
        rstd = 1.0 / tl.sqrt_rn(tl.sum(deviation * deviation) / (P - 1) + EPS)
    pred = tl.load(pred_ptr + row * P + i, mask=inside, other=0.0).to(tl.float32)
    error = tl.where(inside, pred - (target - center) * rstd, 0.0)
    tl.store(rows_ptr + row, tl.sum(error * error) / P)
    tl.store(center_ptr + row, center)
    tl.store(rstd_ptr + row, rstd)


@triton.jit
def _masked_mse_bwd_kernel(grad_pred_ptr, grad_rows_ptr, pred_ptr, images_ptr, ids_ptr, center_ptr, rstd_ptr,
                           mean_ptr, std_ptr, Q, columns, stride_b, stride_c, stride_y, stride_x,
                           C: tl.constexpr, PATCH: tl.constexpr, IS_BYTES: tl.constexpr,
                           BLOCK_P: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)  # one program per predicted patch
    i = tl.arange(0, BLOCK_P)
    P = C * PATCH * PATCH
    inside = i < P
    target = _load_target(images_ptr, ids_ptr, mean_ptr, std_ptr, row, i, inside, Q, columns,
                          stride_b, stride_c, stride_y, stride_x, C, PATCH, IS_BYTES)  # fmt: skip
    target = (target - tl.load(center_ptr + row)) * tl.load(rstd_ptr + row)
    pred = tl.load(pred_ptr + row * P + i, mask=inside, other=0.0).to(tl.float32)
    grad = (pred - target) * (tl.load(grad_rows_ptr + row) * 2.0 / P)
    tl.store(grad_pred_ptr + row * P + i, grad.to(grad_pred_ptr.dtype.element_ty), mask=inside)


def _masked_mse_triton(
    pred: Tensor, images: Tensor, ids: Tensor, patch_size: int, norm_pix: bool, mean: Tensor | None, std: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    B, Q, P = pred.shape
    rows, center, rstd = (torch.empty(B, Q, dtype=torch.float32, device=pred.device) for _ in range(3))
    if rows.numel() == 0:
        return rows, center, rstd
    is_bytes = mean is not None
    block = triton.next_power_of_2(P)
    with torch.cuda.device_of(pred):
        _masked_mse_fwd_kernel[(B * Q,)](
            rows, center, rstd, pred.contiguous(), images, ids.contiguous(), mean if is_bytes else rows,
            std if is_bytes else rows, Q, images.shape[3] // patch_size, *images.stride(),
            EPS=EPS, C=images.shape[1], PATCH=patch_size, NORM_PIX=norm_pix,
            IS_BYTES=is_bytes, BLOCK_P=block, num_warps=warps(block),
        )  # fmt: skip
    return rows, center, rstd


def _masked_mse_bwd_triton(
    grad_rows: Tensor, pred: Tensor, images: Tensor, ids: Tensor, center: Tensor, rstd: Tensor, patch_size: int,
    mean: Tensor | None, std: Tensor | None,
) -> Tensor:  # fmt: skip
    B, Q, P = pred.shape
    grad_pred = torch.empty(B, Q, P, dtype=pred.dtype, device=pred.device)
    if grad_pred.numel() == 0:
        return grad_pred
    is_bytes = mean is not None
    block = triton.next_power_of_2(P)
    with torch.cuda.device_of(pred):
        _masked_mse_bwd_kernel[(B * Q,)](
            grad_pred, grad_rows.contiguous(), pred.contiguous(), images, ids.contiguous(), center, rstd,
            mean if is_bytes else center, std if is_bytes else center, Q, images.shape[3] // patch_size, *images.stride(),
            C=images.shape[1], PATCH=patch_size, IS_BYTES=is_bytes, BLOCK_P=block, num_warps=warps(block),
        )  # fmt: skip
    return grad_pred


@torch.library.custom_op("fastmae::masked_mse", mutates_args=())
def _masked_mse(
    pred: Tensor, images: Tensor, ids: Tensor, patch_size: int, norm_pix: bool, mean: Tensor | None, std: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    body = _masked_mse_triton if use_triton(pred) else masked_mse_ref
    return body(pred, images, ids, patch_size, norm_pix, mean, std)


@_masked_mse.register_fake
def _(pred, images, ids, patch_size, norm_pix, mean, std):
    return tuple(pred.new_empty(ids.shape, dtype=_compute_dtype(pred)) for _ in range(3))


@torch.library.custom_op("fastmae::masked_mse_bwd", mutates_args=())
def _masked_mse_bwd(
    grad_rows: Tensor, pred: Tensor, images: Tensor, ids: Tensor, center: Tensor, rstd: Tensor, patch_size: int,
    mean: Tensor | None, std: Tensor | None,
) -> Tensor:  # fmt: skip
    body = _masked_mse_bwd_triton if use_triton(pred) else masked_mse_bwd_ref
    return body(grad_rows, pred, images, ids, center, rstd, patch_size, mean, std)


@_masked_mse_bwd.register_fake
def _(grad_rows, pred, images, ids, center, rstd, patch_size, mean, std):
    return torch.empty_like(pred, memory_format=torch.contiguous_format)


def _save_for_backward(ctx, inputs, output):
    pred, images, ids, ctx.patch_size, _, mean, std = inputs
    _, center, rstd = output
    ctx.mark_non_differentiable(center, rstd)
    ctx.save_for_backward(pred, images, ids, center, rstd, mean, std)


def _masked_mse_backward(ctx, grad_rows, *_):
    pred, images, ids, center, rstd, mean, std = ctx.saved_tensors
    grad = _masked_mse_bwd(grad_rows, pred, images, ids, center, rstd, ctx.patch_size, mean, std)
    return grad, None, None, None, None, None, None


_masked_mse.register_autograd(_masked_mse_backward, setup_context=_save_for_backward)
