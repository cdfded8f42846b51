"""What the kernels' benchmarks run: each op as a training step uses it, its twin, its inputs and its least traffic."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmae import kernels
from fastmae.model.block.block import LAYER_NORM_EPS
from fastmae.model.config import ModelConfig, kept_patches
from fastmae.model.masking import random_masking


@dataclass(frozen=True)
class Sizes:
    """Letters of the ops: B images, L patches, K kept, Q predicted, P values of a patch, D and E encoder and decoder width."""

    B: int
    L: int
    K: int
    Q: int
    P: int
    D: int
    E: int
    config: ModelConfig

    @classmethod
    def of(cls, config: ModelConfig, batch: int, mask_ratio: float = 0.75) -> "Sizes":
        """Those of a training step."""
        L, K = config.patches, kept_patches(config.patches, mask_ratio)
        return cls(batch, L, K, L - K, config.patch_values, config.embed_dim, config.decoder_embed_dim, config)


@dataclass(frozen=True)
class Case:
    """An op as a step uses it: its inputs, its two bodies, which inputs get gradients, and its least traffic in bytes."""

    name: str
    inputs: Callable[[Sizes, torch.device, torch.dtype], tuple]
    op: Callable[..., Tensor | tuple[Tensor, ...]]
    twin: Callable[..., Tensor | tuple[Tensor, ...]]
    forward_bytes: Callable[[Sizes, int], int]
    """From sizes and the compute dtype's bytes."""
    backward_bytes: Callable[[Sizes, int], int] | None = None
    differentiable: tuple[int, ...] = ()
    """Indices of the inputs that get gradients."""
    compiles: bool = True
    """Whether the twin is worth compiling: not where it would be compiled again for every image's size."""


def _images(s: Sizes, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    images = torch.randint(0, 256, (s.B, s.config.in_chans, *s.config.img_size), dtype=torch.uint8, device=device)
    return images, *(torch.tensor(v, device=device) for v in (s.config.pixel_mean, s.config.pixel_std))


def _masking(s: Sizes, device: torch.device):
    return random_masking(s.B, s.L, 0.75, seed=0, device=device)


def _gather_inputs(s, device, dtype):
    images, mean, std = _images(s, device)
    return images, _masking(s, device).ids_keep, s.config.patch_size, mean, std, dtype


def _loss_inputs(s, device, dtype):
    images, mean, std = _images(s, device)
    pred = torch.randn(s.B, s.Q, s.P, device=device, dtype=dtype, requires_grad=True)
    return pred, images, _masking(s, device).ids_predict, s.config.patch_size, True, mean, std


def _rows_inputs(s, device, dtype):
    masking = _masking(s, device)
    return torch.randn(s.B, s.L, s.D, device=device, dtype=dtype, requires_grad=True), masking.ids_keep, masking.ids_restore


def _decoder_inputs(s, device, dtype):
    masking = _masking(s, device)
    x = torch.randn(s.B, 1 + s.K, s.E, device=device, dtype=dtype, requires_grad=True)
    token = torch.randn(s.E, device=device, requires_grad=True)
    return x, token, torch.randn(1 + s.L, s.E, device=device), masking.ids_keep, masking.ids_predict, torch.float32


def _masking_inputs(s, device, dtype):
    ids = torch.arange(s.B, device=device)
    return 0, torch.zeros_like(ids), ids, s.L, s.K, s.Q


def _boxes(s: Sizes) -> Tensor:
    """The same for every set: sides of 45% to 100% of an image of 256 x 256 pixels, as for a fifth to all of its area."""
    generator = torch.Generator().manual_seed(0)
    sides = torch.randint(115, 257, (s.B, 2), generator=generator)
    corners = (torch.rand(s.B, 2, generator=generator) * (257 - sides)).long()
    return torch.cat([corners, sides], 1).int()


def _crop_inputs(s, device, dtype):
    """Tensors on the device, the crops' size, and what the twin reads on the host, for which a CUDA graph cannot wait."""
    image = 256 * 256 * s.config.in_chans
    pixels = torch.randint(0, 256, (s.B * image,), dtype=torch.uint8, device=device)
    host = (torch.arange(s.B) * image, torch.full((s.B,), 256).int(), _boxes(s), torch.arange(s.B) % 2 == 0)
    return pixels, *(t.to(device) for t in host), s.config.img_size, s.config.in_chans, host


def _encoder_attention_inputs(s, device, dtype):
    H = s.config.num_heads
    return (torch.randn(s.B, 1 + s.K, 3, H, s.D // H, device=device, dtype=dtype, requires_grad=True),)


def _decoder_attention_inputs(s, device, dtype):
    H = s.config.decoder_num_heads
    return (torch.randn(s.B, 1 + s.L, 3, H, s.E // H, device=device, dtype=dtype, requires_grad=True),)


def _attention_by_torch(packed: Tensor) -> Tensor:
    """What a step would use otherwise, faster than the explicit twin: its gradient is concatenated of three."""
    q, k, v = (x.transpose(1, 2) for x in packed.unbind(2))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def _crop_bytes(s: Sizes, width: int) -> int:
    out = s.B * math.prod(s.config.img_size)
    return s.config.in_chans * (int(_boxes(s)[:, 2:].prod(1).sum()) + out)


def _norm_inputs(s, device, dtype):
    """The stream in float32, what a block's linear layer adds to it, and the layer's bias."""
    x, branch = torch.randn(2, s.B, 1 + s.K, s.D, device=device).unbind(0)
    parameters = torch.randn(3, s.D, device=device).unbind(0)
    return *(t.detach().requires_grad_() for t in (x, branch.to(dtype), *parameters)), dtype


def _norm(x, branch, weight, bias, branch_bias, dtype):
    return kernels.add_norm(x, branch, weight, bias, LAYER_NORM_EPS, branch_bias, dtype)


def _norm_twin(x, branch, weight, bias, branch_bias, dtype):
    total = x + _Biased.apply(branch, branch_bias)
    return total, F.layer_norm(total, x.shape[-1:], weight, bias, LAYER_NORM_EPS).to(dtype)


def _norm_bwd_bytes(s: Sizes, width: int) -> int:
    written = 4 + (width if width < 4 else 0)  # a branch in float32 shares its gradient with the stream
    return s.B * (1 + s.K) * (s.D * (width + 8 + written) + 8)


def _gelu_inputs(s, device, dtype):
    hidden = int(s.config.mlp_ratio * s.D)
    x = torch.randn(s.B, 1 + s.K, hidden, device=device, dtype=dtype, requires_grad=True)
    return x, torch.randn(hidden, device=device, requires_grad=True)


def _gelu_bytes(s: Sizes, tensors: int) -> int:
    return tensors * s.B * (1 + s.K) * int(s.config.mlp_ratio * s.D)


class _Biased(torch.autograd.Function):
    """What a linear layer has made, its bias added: from the gradient the layer sums the bias's, in a pass of its own."""

    @staticmethod
    def forward(ctx, y, bias):
        return y.view_as(y)

    @staticmethod
    def backward(ctx, grad):
        return grad, grad.flatten(0, -2).sum(0, dtype=torch.float32)


CASES = (
    Case("gather_patches", _gather_inputs, kernels.gather_patches, kernels.gather_patches_ref,
         lambda s, width: s.B * s.K * s.P * (1 + width)),
    Case("masked_mse", _loss_inputs, kernels.masked_mse, lambda *a: kernels.masked_mse_ref(*a)[0].mean(),
         lambda s, width: s.B * s.Q * (s.P * (1 + width) + 12), lambda s, width: s.B * s.Q * s.P * (1 + 2 * width), (0,)),
    Case("take_rows", _rows_inputs, kernels.take_rows, lambda *a: kernels.take_rows_ref(*a, None),
         lambda s, width: 2 * s.B * s.K * s.D * width, lambda s, width: s.B * (s.K + s.L) * s.D * width, (0,)),
    Case("decoder_input", _decoder_inputs, kernels.decoder_input, kernels.decoder_input_ref,
         lambda s, width: s.B * s.E * ((1 + s.K) * width + (1 + s.K + s.Q) * 4),
         lambda s, width: s.B * s.E * ((1 + s.K) * width + (1 + s.K + s.Q) * 4), (0, 1)),
    Case("add_norm", _norm_inputs, _norm, _norm_twin,
         lambda s, width: s.B * (1 + s.K) * (s.D * (8 + 2 * width) + 8), _norm_bwd_bytes, (0, 1, 2, 3, 4)),
    Case("gelu", _gelu_inputs, kernels.gelu, lambda x, bias: F.gelu(_Biased.apply(x, bias)),
         lambda s, width: _gelu_bytes(s, 2 * width), lambda s, width: _gelu_bytes(s, 3 * width), (0, 1)),
    Case("random_masking", _masking_inputs, lambda *a: kernels.random_masking(*a)[0],
         lambda *a: kernels.random_masking_ref(*a)[0], lambda s, width: s.B * (16 + 8 * s.L)),
    Case("resized_crop", _crop_inputs, lambda *a: kernels.resized_crop(*a[:7]),
         lambda *a: kernels.resized_crop_ref(a[0], *a[7], *a[5:7]), _crop_bytes, compiles=False),
    Case("short_attention encoder", _encoder_attention_inputs, kernels.short_attention, _attention_by_torch,
         lambda s, width: 4 * s.B * (1 + s.K) * s.D * width, lambda s, width: 8 * s.B * (1 + s.K) * s.D * width, (0,)),
    Case("short_attention decoder", _decoder_attention_inputs, kernels.short_attention, _attention_by_torch,
         lambda s, width: 4 * s.B * (1 + s.L) * s.E * width, lambda s, width: 8 * s.B * (1 + s.L) * s.E * width, (0,)),
)  # fmt: skip
