"""Every op's formula in torch's own operations, for inputs in any dtype: what errors are taken against, and torch's own error.

In float64 a formula is the exact result; in float32, bf16 or fp16 it is what a program without kernels computes. Formulas are
written apart from the twins, and get their gradients from autograd, so that a mistake in a twin is seen too. Whatever the
dtype of a prediction, images are normalised and patches averaged in float32 at least, as torch's autocast would.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmae import kernels
from fastmae.benchmarks.kernels.cases import CASES
from fastmae.benchmarks.kernels.shape import Shape
from fastmae.kernels.masked_mse import EPS
from fastmae.kernels.philox import MASKS, random_words
from fastmae.kernels.short_attention import MOST_CHANNELS, MOST_TOKENS

Inputs = Callable[[Shape, torch.device, torch.dtype], tuple]


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
    limit: Callable[[Shape], str] = lambda shape: ""
    """Why the op does not take a shape, or nothing."""


_SPEED = {case.name: case.inputs for case in CASES}


def _measured(name: str) -> Inputs:
    """The inputs with which the op is timed."""
    return lambda s, device, dtype: _SPEED[name](s.sizes(), device, dtype)


def _unshuffle_inputs(s: Shape, device: torch.device, dtype: torch.dtype) -> tuple:
    """Visible rows back into their places, the fill in those of masked patches."""
    x, ids_keep, ids_restore = _measured("take_rows")(s, device, dtype)
    fill = torch.randn(s.D, device=device).to(dtype).requires_grad_()
    return x[:, : ids_keep.shape[1]].detach().requires_grad_(), ids_restore, ids_keep, fill


def _crop_inputs(s: Shape, device: torch.device, dtype: torch.dtype) -> tuple:
    return _measured("resized_crop")(s, device, dtype)[:7]  # without what its twin reads on the host


def _normal(*size: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(size, device=device).to(dtype).requires_grad_()


def _self_attention_inputs(s: Shape, device: torch.device, dtype: torch.dtype) -> tuple:
    packed = _normal(s.B, s.N, 3, s.heads, s.D // s.heads, device=device, dtype=dtype)
    return packed, None, _normal(3 * s.D, device=device), None


def _cross_attention_inputs(s: Shape, device: torch.device, dtype: torch.dtype) -> tuple:
    """Fewer queries than keys, and another number of keys for each image."""
    q = _normal(s.B, (s.N + 1) // 2, s.heads, s.D // s.heads, device=device, dtype=dtype)
    packed = _normal(s.B, s.N, 2, s.heads, s.D // s.heads, device=device, dtype=dtype)
    keys = s.N - torch.arange(s.B, device=device, dtype=torch.int32) % s.N
    return packed, q, _normal(3 * s.D, device=device), keys


def _add_norm_inputs(s: Shape, device: torch.device, dtype: torch.dtype, residual: torch.dtype | None = None) -> tuple:
    x = _normal(s.B, s.N, s.D, device=device, dtype=residual or dtype)
    branch = _normal(s.B, s.N, s.D, device=device, dtype=dtype)
    weight, bias, branch_bias = (_normal(s.D, device=device) for _ in range(3))
    return x, branch, weight, bias, 1e-6, branch_bias, dtype


def _norm_inputs(s: Shape, device: torch.device, dtype: torch.dtype) -> tuple:
    """As the first norm of a model: nothing is added."""
    x, _, weight, bias, eps, _, _ = _add_norm_inputs(s, device, dtype, torch.float32)
    return x, None, weight, bias, eps, None, dtype


def _gelu_inputs(s: Shape, device: torch.device, dtype: torch.dtype) -> tuple:
    return _normal(s.B, s.N, s.D, device=device, dtype=dtype), _normal(s.D, device=device)


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


def _added(bias: Tensor) -> Tensor:
    """Zeros whose gradient is that of ``bias``, as if it had just been added."""
    return bias - bias.detach()


def _short_attention(packed, q, bias, keys) -> Tensor:
    H, d = packed.shape[3:]
    added = _added(bias).to(packed.dtype).view(3, H, d)
    if q is None:
        q, k, v = (packed + added).unbind(2)
    else:
        q, (k, v) = q + added[0], (packed + added[1:]).unbind(2)
    is_key = None if keys is None else (torch.arange(k.shape[1], device=k.device) < keys[:, None])[:, None, None]
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_key).transpose(1, 2)


def _attention_limit(s: Shape) -> str:
    fits = s.N <= MOST_TOKENS and s.D // s.heads <= MOST_CHANNELS
    return "" if fits else f"takes at most {MOST_TOKENS} tokens N and {MOST_CHANNELS} channels of a head"


def _add_norm(x, branch, weight, bias, eps, branch_bias, dtype) -> tuple[Tensor, Tensor]:
    total = x if branch is None else (x.to(weight.dtype) + branch.to(weight.dtype) + _added(branch_bias)).to(x.dtype)
    return total, F.layer_norm(total.to(weight.dtype), total.shape[-1:], weight, bias, eps).to(dtype)


def _gelu(x, bias) -> Tensor:
    return F.gelu(x.to(bias.dtype) + _added(bias)).to(x.dtype)


_ATTENTION = {"packed": 0, "bias": 2}
_ADD_NORM = {"x": 0, "branch": 1, "weight": 2, "bias": 3, "branch_bias": 5}
FORMULAS = (
    Formula("gather_patches", _measured("gather_patches"), kernels.gather_patches, _gather_patches),
    Formula("masked_mse", _measured("masked_mse"), kernels.masked_mse, _masked_mse, ("loss",), {"pred": 0}),
    Formula("take_rows", _measured("take_rows"), kernels.take_rows, _take_rows, differentiable={"x": 0}),
    Formula("take_rows with fill", _unshuffle_inputs, kernels.take_rows, _take_rows, differentiable={"x": 0, "fill": 3}),
    Formula("decoder_input", _measured("decoder_input"), kernels.decoder_input, _decoder_input,
            differentiable={"x": 0, "mask_token": 1}),
    Formula("short_attention", _self_attention_inputs, kernels.short_attention, _short_attention,
            differentiable=_ATTENTION, limit=_attention_limit),
    Formula("short_attention of q", _cross_attention_inputs, kernels.short_attention, _short_attention,
            differentiable={**_ATTENTION, "q": 1}, limit=_attention_limit),
    Formula("add_norm", _add_norm_inputs, kernels.add_norm, _add_norm, ("sum", "normed"), _ADD_NORM),
    Formula("add_norm to fp32", partial(_add_norm_inputs, residual=torch.float32), kernels.add_norm, _add_norm,
            ("sum", "normed"), _ADD_NORM),
    Formula("add_norm of nothing", _norm_inputs, kernels.add_norm, _add_norm, ("sum", "normed"),
            {name: _ADD_NORM[name] for name in ("x", "weight", "bias")}),
    Formula("gelu", _gelu_inputs, kernels.gelu, _gelu, differentiable={"x": 0, "bias": 1}),
    Formula("random_masking", _measured("random_masking"), kernels.random_masking, _random_masking,
            ("ids_keep", "ids_predict", "ids_restore"), is_exact=True),
    Formula("resized_crop", _crop_inputs, kernels.resized_crop, _resized_crop, is_exact=True),
)  # fmt: skip
