"""Crop a box of each image, resize it with an antialiased bicubic filter, optionally mirror it: uint8 to uint8 in one pass.

    out[b, c, y, x] = round(sum_ij u_yi v_xj image[b, top + i, left + j, c]),    clamped to 0..255
    u_yi = k((i - n (y + 1/2) + 1/2) / s) / (their sum over the box's rows i),   n = height / h,  s = max(n, 1)
    v_xj = the same of the columns j, width and w;  mirrored: w - 1 - x for x
    k(t) = 3/2 |t|^3 - 5/2 |t|^2 + 1 below 1,  -1/2 |t|^3 + 5/2 |t|^2 - 4 |t| + 2 below 2,  0 from there on

B images of any sizes are in one buffer; boxes are height x width, crops C x h x w; nothing is rounded between the two axes.
Sources: Keys 1981 (doi 10.1109/TASSP.1981.1163711), a = -1/2; torch's ``interpolate``
with ``antialias=True``.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from fastmae.kernels.dispatch import use_triton

_TILE = 16  # outputs of a program along each axis, and rows of the image resized along x at a time; one warp, 8 a thread


def resized_crop(
    pixels: Tensor, offsets: Tensor, widths: Tensor, boxes: Tensor, flips: Tensor, size: tuple[int, int], channels: int = 3
) -> Tensor:
    """The boxes of the images, resized to ``size`` (h, w): (B, C, h, w) uint8, contiguous.

    ``pixels`` (N,) uint8 holds every image somewhere, row-major (height, width, C); ``offsets`` (B,) int64 the first byte of
    each, ``widths`` (B,) int32 its width in pixels. ``boxes`` (B, 4) int32: top, left, height, width in pixels, inside the
    image, sides at least 1; ``flips`` (B,) bool, True mirrors left to right. No gradient. Raises ValueError on a wrong
    shape or dtype; on a box outside its buffer only on a CPU, because checking a GPU's boxes would synchronise.
    """
    check_crops(pixels, offsets, widths, boxes, flips, size, channels)
    return _resized_crop(pixels, offsets, widths, boxes, flips, *size, channels)


def resized_crop_ref(
    pixels: Tensor, offsets: Tensor, widths: Tensor, boxes: Tensor, flips: Tensor, size: tuple[int, int], channels: int = 3
) -> Tensor:
    """The twin of ``resized_crop``: the same up to one level, image by image in plain torch."""
    pixels, out = pixels.contiguous(), pixels.new_empty(len(boxes), channels, *size)
    images = zip(offsets.tolist(), widths.tolist(), boxes.tolist(), flips.tolist(), strict=True)
    for b, (offset, stride, (top, left, height, width), flip) in enumerate(images):
        first = pixels[offset + (top * stride + left) * channels :]
        box = first.as_strided((1, channels, height, width), (0, 1, stride * channels, channels))
        crop = F.interpolate(box.float(), tuple(size), mode="bicubic", antialias=True)[0].round().clamp(0, 255)
        out[b] = crop.flip(2) if flip else crop
    return out


def check_crops(
    pixels: Tensor, offsets: Tensor, widths: Tensor, boxes: Tensor, flips: Tensor, size: tuple[int, int], channels: int
) -> None:
    """Raise ValueError unless shapes, dtypes and devices are what ``resized_crop`` states."""
    if pixels.dtype != torch.uint8 or pixels.ndim != 1:
        raise ValueError(f"pixels must be uint8 (N,), got {pixels.dtype} {tuple(pixels.shape)}")
    if boxes.dtype != torch.int32 or boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(f"boxes must be int32 (B, 4): top, left, height, width; got {boxes.dtype} {tuple(boxes.shape)}")
    B = boxes.shape[0]
    wanted = (("offsets", offsets, torch.int64), ("widths", widths, torch.int32), ("flips", flips, torch.bool))
    for name, given, dtype in wanted:
        if given.dtype != dtype or given.shape != (B,):
            raise ValueError(f"{name} must be {dtype} ({B},), got {given.dtype} {tuple(given.shape)}")
    for name, given in (("boxes", boxes), *(w[:2] for w in wanted)):
        if given.device != pixels.device:
            raise ValueError(f"{name} must be on the pixels' device {pixels.device}, got {given.device}")
    if len(size) != 2 or min(*size, channels) < 1:
        raise ValueError(f"size must be two numbers (h, w) of at least 1, channels at least 1, got {tuple(size)}, {channels}")


def _check_boxes(pixels: Tensor, offsets: Tensor, widths: Tensor, boxes: Tensor, channels: int) -> None:
    """Raise ValueError unless every box is inside its image and the buffer."""
    top, left, height, width = boxes.long().unbind(1)
    end = offsets + ((top + height - 1) * widths + left + width) * channels
    outside = (torch.minimum(height, width) < 1) | (torch.minimum(top, left) < 0) | (left + width > widths)
    outside |= (offsets < 0) | (end > len(pixels))
    if outside.any():
        b = int(outside.nonzero()[0])
        raise ValueError(
            "boxes must have sides of at least 1 and be inside their images, got top, left, height, width "
            f"{boxes[b].tolist()} in image {b}, {int(widths[b])} pixels wide from byte {int(offsets[b])} of {len(pixels)}"
        )


@triton.jit
def _weight(j, centre, length, inverse):
    """Weight of pixel ``j`` of an axis in an output centred at ``centre``, not normalised; 0 outside the box."""
    t = tl.abs((j.to(tl.float32) - centre + 0.5) * inverse)
    inner = (1.5 * t - 2.5) * t * t + 1.0
    outer = ((2.5 - 0.5 * t) * t - 4.0) * t + 2.0
    return tl.where((j < length) & (t < 2.0), tl.where(t < 1.0, inner, outer), 0.0)


@triton.jit
def _axis(i, length, size):
    """Of outputs ``i`` along an axis: centre, first pixel, number of pixels, 1 / s, 1 / sum of weights."""
    scale = tl.div_rn(length.to(tl.float32), tl.full([], size, tl.float32))  # a size of 1 is a constant
    stretch = tl.maximum(scale, 1.0)
    inverse = tl.div_rn(1.0, stretch)
    centre = scale * (i.to(tl.float32) + 0.5)
    first = tl.maximum(tl.floor(centre - 0.5 - 2.0 * stretch).to(tl.int32) + 1, 0)
    taps = tl.ceil(4.0 * stretch).to(tl.int32)
    total = tl.zeros_like(centre)
    t = 0
    while t < taps:  # no ``range`` here and below: Triton 3.6's interpreter takes none of a loaded length
        total += _weight(first + t, centre, length, inverse)
        t += 1
    return centre, first, taps, inverse, 1.0 / total


@triton.jit
def _resized_crop_kernel(out_ptr, pixels_ptr, offsets_ptr, widths_ptr, boxes_ptr, flips_ptr, h, w,
                         C: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)  # one program per tile and channel of a crop
    c = program % C  # fastest, because the channels of a tile read the same bytes
    tiles_x = tl.cdiv(w, BLOCK)
    tiles = tiles_x * tl.cdiv(h, BLOCK)
    tile = (program // C % tiles).to(tl.int32)
    b = program // C // tiles
    u = tile // tiles_x * BLOCK + tl.arange(0, BLOCK)
    v = tile % tiles_x * BLOCK + tl.arange(0, BLOCK)
    y, x = tl.minimum(u, h - 1), tl.minimum(v, w - 1)
    x = tl.where(tl.load(flips_ptr + b) != 0, w - 1 - x, x)
    top, left = tl.load(boxes_ptr + 4 * b), tl.load(boxes_ptr + 4 * b + 1)
    height, width = tl.load(boxes_ptr + 4 * b + 2), tl.load(boxes_ptr + 4 * b + 3)
    stride = tl.load(widths_ptr + b).to(tl.int64) * C
    box_ptr = pixels_ptr + tl.load(offsets_ptr + b) + top * stride + left.to(tl.int64) * C + c

    centre_y, first_y, taps_y, inverse_y, norm_y = _axis(y, height, h)
    centre_x, first_x, taps_x, inverse_x, norm_x = _axis(x, width, w)
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    row = tl.min(first_y)
    end = tl.minimum(tl.max(first_y) + taps_y, height)
    while row < end:
        rows = row + tl.arange(0, BLOCK)
        row_ptr = box_ptr + tl.minimum(rows, end - 1) * stride
        across = tl.zeros([BLOCK, BLOCK], tl.float32)
        t = 0
        while t < taps_x:
            j = first_x + t
            pixel = tl.load(row_ptr[:, None] + (tl.minimum(j, width - 1) * C)[None, :]).to(tl.float32)
            across += pixel * _weight(j, centre_x, width, inverse_x)[None, :]
            t += 1
        down = _weight(rows[None, :], centre_y[:, None], height, inverse_y)  # (y, row)
        acc = tl.dot(down, across, acc, input_precision="ieee")
        row += BLOCK
    level = tl.minimum(tl.maximum(acc * norm_y[:, None] * norm_x[None, :], 0.0), 255.0)
    level = (level + 12582912.0) - 12582912.0  # 3 * 2**22: float32 drops the fraction, ties to even, as torch.round does
    inside = (u < h)[:, None] & (v < w)[None, :]
    out = out_ptr + (b * C + c) * h * w + u[:, None] * w + v[None, :]
    tl.store(out, level.to(tl.uint8), mask=inside)


def _resized_crop_triton(
    pixels: Tensor, offsets: Tensor, widths: Tensor, boxes: Tensor, flips: Tensor, h: int, w: int, channels: int
) -> Tensor:
    out = pixels.new_empty(len(boxes), channels, h, w)
    if out.numel() == 0:
        return out
    programs = len(boxes) * channels * triton.cdiv(h, _TILE) * triton.cdiv(w, _TILE)
    with torch.cuda.device_of(pixels):
        _resized_crop_kernel[(programs,)](
            out, pixels.contiguous(), offsets.contiguous(), widths.contiguous(), boxes.contiguous(),
            flips.contiguous().view(torch.uint8), h, w, C=channels, BLOCK=_TILE, num_warps=1,
        )  # fmt: skip
    return out


@torch.library.custom_op("fastmae::resized_crop", mutates_args=())
def _resized_crop(
    pixels: Tensor, offsets: Tensor, widths: Tensor, boxes: Tensor, flips: Tensor, h: int, w: int, channels: int
) -> Tensor:
    if pixels.device.type == "cpu":
        _check_boxes(pixels, offsets, widths, boxes, channels)
    if use_triton(pixels):
        return _resized_crop_triton(pixels, offsets, widths, boxes, flips, h, w, channels)
    return resized_crop_ref(pixels, offsets, widths, boxes, flips, (h, w), channels)


@_resized_crop.register_fake
def _(pixels, offsets, widths, boxes, flips, h, w, channels):
    return pixels.new_empty(boxes.shape[0], channels, h, w)
