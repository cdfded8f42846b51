"""Every op's formula in torch's own operations, for inputs in any dtype: what errors are taken against, and torch's own error.

In float64 a formula is the exact result; in float32, bf16 or fp16 it is what a program without kernels computes. Formulas are
written apart from the twins, and get their gradients from autograd, so that a mistake in a twin is seen too. Whatever the
dtype of a prediction, images are normalised and patches averaged in float32 at least, as torch's autocast would.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmae import kernels
from fastmae.benchmarks.kernels import speed
from fastmae.benchmarks.kernels.speed import Sizes
from fastmae.kernels.masked_mse import EPS
from fastmae.kernels.philox import MASKS, random_words

Inputs = Callable[[Sizes, torch.device, torch.dtype], tuple]


@dataclass(frozen=True)
class Formula:
    """An op beside its formula, which takes the same arguments."""

    name: str
    """The op's, and what is special about this use of it."""
    inputs: Inputs
    """The arguments; the dtype is that of activations."""
    op: Callable[..., Tensor | tuple[Tensor, ...]]
    formula: Callable[..., Tensor | tuple[Tensor, ...]]
    outputs: tuple[str, ...] = ("output",)
    differentiable: dict[str, int] = field(default_factory=dict)
    """Names and positions of the arguments that get gradients."""
    is_exact: bool = False
    """Whether results are integers, whatever the dtype of activations."""


def _unshuffle_inputs(s: Sizes, device: torch.device, dtype: torch.dtype) -> tuple:
    """Visible rows back into their places, the fill in those of masked patches."""
    x, ids_keep, ids_restore = _INPUTS["take_rows"](s, device, dtype)
    fill = torch.randn(s.D, device=device).to(dtype).requires_grad_()
    return x[:, : s.K].detach().requires_grad_(), ids_restore, ids_keep, fill


def _crop_inputs(s: Sizes, device: torch.device, dtype: torch.dtype) -> tuple:
    return _INPUTS["resized_crop"](s, device, dtype)[:7]  # without what its twin reads on the host


def _patches(images: Tensor, ids: Tensor, patch_size: int, mean: Tensor, std: Tensor) -> Tensor:
    """(B, K, C, p p) in the dtype of ``mean``."""
    images = (images.to(mean.dtype) / 255 - mean[:, None, None]) / std[:, None, None]
    rows = F.unfold(images, patch_size, stride=patch_size).mT  # (B, L, C p p), channel slowest
    return rows[torch.arange(len(ids), device=ids.device)[:, None], ids].unflatten(2, (-1, patch_size**2))


def _gather_patches(images, ids, patch_size, mean, std, dtype) -> Tensor:
    return _patches(images, ids, patch_size, mean, std).flatten(2).to(dtype)


def _masked_mse(pred, images, ids, patch_size, norm_pix, mean, std) -> Tensor:
    target = _patches(images, ids, patch_size, mean, std).mT.flatten(2)  # channel fastest
    if norm_pix:
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + EPS).sqrt()
    return (pred.to(target.dtype) - target).square().mean()


def _take_rows(x, ids, inverse, fill=None) -> Tensor:
    is_hole = (ids >= x.shape[1])[..., None]
    taken = x[torch.arange(len(x), device=x.device)[:, None], ids.clamp(max=x.shape[1] - 1)]
    return taken.masked_fill(is_hole, 0) if fill is None else torch.where(is_hole, fill, taken)


def _decoder_input(x, mask_token, positions, ids_keep, ids_predict, dtype) -> Tensor:
    where = torch.cat([torch.zeros_like(ids_keep[:, :1]), 1 + ids_keep, 1 + ids_predict], 1)
    rows = torch.cat([x.to(mask_token.dtype), mask_token.expand(*ids_predict.shape, -1)], 1)
    return (rows + positions[where]).to(dtype)


def _random_masking(seed, epochs, sample_ids, patches, kept, predicted) -> tuple[Tensor, ...]:
    shuffle = random_words(seed, MASKS, epochs, sample_ids, patches).argsort(dim=1, stable=True)
    return tuple(ids.int() for ids in (shuffle[:, :kept], shuffle[:, kept : kept + predicted], shuffle.argsort(1)))


def _resized_crop(pixels, offsets, widths, boxes, flips, size, channels) -> Tensor:
    """In the dtype of ``pixels``: rounded for bytes, exact for floating point."""
    crops = []
    host = zip(offsets.tolist(), widths.tolist(), boxes.tolist(), flips.tolist(), strict=True)
    for offset, width, (top, left, rows, columns), flip in host:
        image = pixels[offset : offset + (top + rows) * width * channels].view(-1, width, channels)
        box = image[top:, left : left + columns].permute(2, 0, 1)[None]
        box = box if box.is_floating_point() else box.float()
        crop = F.interpolate(box, size, mode="bicubic", antialias=True)[0].clamp(0, 255)
        crops.append(crop.flip(2) if flip else crop)
    crops = torch.stack(crops)
    return crops if pixels.is_floating_point() else crops.round().to(pixels.dtype)


_INPUTS = {case.name: case.inputs for case in speed.CASES}
FORMULAS = (
    Formula("gather_patches", _INPUTS["gather_patches"], kernels.gather_patches, _gather_patches),
    Formula("masked_mse", _INPUTS["masked_mse"], kernels.masked_mse, _masked_mse, ("loss",), {"pred": 0}),
    Formula("take_rows", _INPUTS["take_rows"], kernels.take_rows, _take_rows, differentiable={"x": 0}),
    Formula("take_rows with fill", _unshuffle_inputs, kernels.take_rows, _take_rows, differentiable={"x": 0, "fill": 3}),
    Formula("decoder_input", _INPUTS["decoder_input"], kernels.decoder_input, _decoder_input,
            differentiable={"x": 0, "mask_token": 1}),
    Formula("random_masking", _INPUTS["random_masking"], kernels.random_masking, _random_masking,
            ("ids_keep", "ids_predict", "ids_restore"), is_exact=True),
    Formula("resized_crop", _crop_inputs, kernels.resized_crop, _resized_crop, is_exact=True),
)  # fmt: skip
