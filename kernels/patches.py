"""Gather the pixels of chosen patches, normalised, in the order of the patch embedding's weight.

    out[b, k, (c, u, v)] = pixel(b, c, y p + u, x p + v),      (y, x) = divmod(ids[b, k], W / p)
    pixel = images                                for floating-point images, which are normalised already
    pixel = (images / 255 - mean[c]) / std[c]     for uint8 images

B images of C channels, K patches of p x p pixels taken from each, P = C p p values in a patch, channel slowest: a linear
layer with the patch embedding's weight (D, C p p) applied to the rows equals the strided convolution at those patches.
Masked patches are never read. Source: He et al. 2021 (arXiv 2111.06377), section 3 "Masking" and "MAE encoder".
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmae.kernels.dispatch import use_triton, warps


def gather_patches(
    images: Tensor,
    ids: Tensor,
    patch_size: int,
    mean: Tensor | None = None,
    std: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Pixels of the patches ``ids``: (B, K, C p p) in ``dtype``, channel slowest inside a row.

    ``images`` (B, C, H, W): uint8 with ``mean`` and ``std`` (C,) float32 in units of [0, 1], or floating point without
    them. ``ids`` (B, K) int32 in [0, H/p W/p), row-major over the grid. ``dtype`` defaults to that of floating-point
    images, float32 for uint8. Differentiable in floating-point ``images``. Raises ValueError on a wrong shape or dtype.
    """
    check_images(images, ids, patch_size, mean, std)
    if dtype is None:
        dtype = images.dtype if images.is_floating_point() else torch.float32
    return _gather_patches(images, ids, patch_size, mean, std, dtype)


def gather_patches_ref(
    images: Tensor, ids: Tensor, patch_size: int, mean: Tensor | None, std: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The twin of ``gather_patches``: the same arguments and values, in plain torch."""
    return patch_pixels(images, ids, patch_size, mean, std).flatten(2).to(dtype)


def patch_pixels(images: Tensor, ids: Tensor, patch_size: int, mean: Tensor | None, std: Tensor | None) -> Tensor:
    """Normalised pixels (B, K, C, p, p) of the patches ``ids``, float32, or float64 for float64 images."""
    B, C, H, W = images.shape
    rows, columns = H // patch_size, W // patch_size
    grid = images.reshape(B, C, rows, patch_size, columns, patch_size).permute(0, 2, 4, 1, 3, 5)  # (B, rows, columns, C, p, p)
    batch = torch.arange(B, device=images.device)[:, None]
    pixels = grid[batch, ids // columns, ids % columns]
    pixels = pixels.to(torch.promote_types(images.dtype, torch.float32) if images.is_floating_point() else torch.float32)
    if mean is None:
        return pixels
    return (pixels / 255 - mean[:, None, None]) / std[:, None, None]


def check_images(images: Tensor, ids: Tensor, patch_size: int, mean: Tensor | None, std: Tensor | None) -> None:
    """Raise ValueError unless the arguments are what ``gather_patches`` states."""
    if images.ndim != 4 or not (images.dtype == torch.uint8 or images.is_floating_point()):
        raise ValueError(f"images must be (B, C, H, W), uint8 or floating point, got {images.dtype} {tuple(images.shape)}")
    if images.shape[2] % patch_size or images.shape[3] % patch_size:
        raise ValueError(f"image size {tuple(images.shape[2:])} must be a multiple of the patch size {patch_size}")
    if ids.dtype != torch.int32 or ids.ndim != 2 or ids.shape[0] != images.shape[0]:
        raise ValueError(f"ids must be int32 ({images.shape[0]}, K), got {ids.dtype} {tuple(ids.shape)}")
    if ids.device != images.device or (mean is not None and mean.device != images.device):
        raise ValueError(f"ids, mean and std must be on the images' device {images.device}, ids are on {ids.device}")
    is_bytes = images.dtype == torch.uint8
    if (mean is not None, std is not None) != (is_bytes, is_bytes):
        raise ValueError("uint8 images need mean and std; floating-point images are normalised already and take neither")
    if is_bytes and not all(t.shape == (images.shape[1],) and t.dtype == torch.float32 for t in (mean, std)):
        raise ValueError(
            f"mean and std must be float32 ({images.shape[1]},), got {mean.dtype} {tuple(mean.shape)} and "
            f"{std.dtype} {tuple(std.shape)}"
        )


@triton.jit
def load_patch(images_ptr, mean_ptr, std_ptr, b, patch, c, u, v, columns, stride_b, stride_c, stride_y, stride_x,
               inside, PATCH: tl.constexpr, IS_BYTES: tl.constexpr):  # fmt: skip
    """Pixels (c, u, v) of one patch of image ``b`` as float32, normalised if they are bytes; 0 outside."""
    y = (patch // columns) * PATCH + u
    x = (patch % columns) * PATCH + v
    offset = b * stride_b + c.to(tl.int64) * stride_c + y.to(tl.int64) * stride_y + x.to(tl.int64) * stride_x
    pixel = tl.load(images_ptr + offset, mask=inside, other=0).to(tl.float32)
    if IS_BYTES:
        mean = tl.load(mean_ptr + c, mask=inside, other=0.0)
        std = tl.load(std_ptr + c, mask=inside, other=1.0)
        pixel = tl.div_rn(tl.div_rn(pixel, tl.full(pixel.shape, 255.0, tl.float32)) - mean, std)  # as exact as torch
    return pixel


@triton.jit
def _gather_patches_fwd_kernel(out_ptr, images_ptr, ids_ptr, mean_ptr, std_ptr, K, columns,
                               stride_b, stride_c, stride_y, stride_x,
                               C: tl.constexpr, PATCH: tl.constexpr, IS_BYTES: tl.constexpr,
                           BLOCK_P: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)  # one program per patch taken; int64 because B * K * P may pass 2**31
    i = tl.arange(0, BLOCK_P)
    P = C * PATCH * PATCH
    c, u, v = i // (PATCH * PATCH), i // PATCH % PATCH, i % PATCH
    patch = tl.load(ids_ptr + row)
    pixel = load_patch(images_ptr, mean_ptr, std_ptr, row // K, patch, c, u, v, columns,
                       stride_b, stride_c, stride_y, stride_x, i < P, PATCH, IS_BYTES)  # fmt: skip
    tl.store(out_ptr + row * P + i, pixel.to(out_ptr.dtype.element_ty), mask=i < P)


def _gather_patches_triton(
    images: Tensor, ids: Tensor, patch_size: int, mean: Tensor | None, std: Tensor | None, dtype: torch.dtype
) -> Tensor:
    B, C, _, W = images.shape
    K = ids.shape[1]
    P = C * patch_size**2
    out = torch.empty(B, K, P, dtype=dtype, device=images.device)
    if out.numel() == 0:
        return out
    is_bytes = mean is not None
    block = triton.next_power_of_2(P)
    with torch.cuda.device_of(images):
        _gather_patches_fwd_kernel[(B * K,)](
            out, images, ids.contiguous(), mean if is_bytes else out, std if is_bytes else out, K, W // patch_size,
            *images.stride(), C=C, PATCH=patch_size, IS_BYTES=is_bytes, BLOCK_P=block, num_warps=warps(block),
        )  # fmt: skip
    return out


@torch.library.custom_op("fastmae::gather_patches", mutates_args=())
def _gather_patches(
    images: Tensor, ids: Tensor, patch_size: int, mean: Tensor | None, std: Tensor | None, dtype: torch.dtype
) -> Tensor:
    body = _gather_patches_triton if use_triton(images) else gather_patches_ref
    return body(images, ids, patch_size, mean, std, dtype)


@_gather_patches.register_fake
def _(images, ids, patch_size, mean, std, dtype):
    return images.new_empty(*ids.shape, images.shape[1] * patch_size**2, dtype=dtype)


def _save_for_backward(ctx, inputs, output):
    images, ids, ctx.patch_size, *_ = inputs
    ctx.save_for_backward(ids)
    ctx.image_shape, ctx.image_dtype = images.shape, images.dtype


def _gather_patches_backward(ctx, grad):
    """Scatter the rows' gradient back into the image. Pretraining does not need it: images are its inputs."""
    if not ctx.needs_input_grad[0]:
        return (None,) * 6
    (ids,) = ctx.saved_tensors
    B, C, H, W = ctx.image_shape
    p, P = ctx.patch_size, grad.shape[-1]
    rows, columns = H // p, W // p
    patches = grad.new_zeros(B, rows * columns, P, dtype=ctx.image_dtype)
    patches = patches.scatter_add(1, ids.long()[..., None].expand(-1, -1, P), grad.to(ctx.image_dtype))
    images = patches.reshape(B, rows, columns, C, p, p).permute(0, 3, 1, 4, 2, 5).reshape(B, C, H, W)
    return images, None, None, None, None, None


_gather_patches.register_autograd(_gather_patches_backward, setup_context=_save_for_backward)
