"""Every op as it is used: what is compiled to count the resources that its kernels need."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from fastmae import kernels
from fastmae.model.config import preset
from fastmae.model.mae import MAE
from fastmae.model.masking import random_masking

_B, _L, _K = 2, 196, 49  # images; patches, visible ones: of a training step of ViT-B
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "uint8": torch.uint8}

Case = tuple[str, Callable[[], object]]
"""What the use of an op is called in the table, and the call, forward and backward."""


def cases(rare: bool = True) -> Iterator[Case]:
    """Every op as training steps of ViT-B and ViT-H and the loader use it; with ``rare`` of other sizes and types too."""
    for model, layout, residual in (("base", "NCHW", "fp32"), ("base", "NHWC", "bf16"), ("huge", "NCHW", "fp32")):
        yield _step(model, layout, residual)
    yield _masks(196)
    yield from _crops(3)
    yield _rows(768, "bf16", has_fill=True)
    yield _sequence(512, "bf16", "bf16")
    for width in (512, 768, 1280):
        yield _norm(width, "fp32", "bf16")
    yield _norm(768, "bf16", "bf16")
    for width in (2048, 3072):
        yield _gelu(width, "bf16")
    for sizes in ((50, 50, 64), (65, 65, 80), (197, 197, 32), (147, 197, 32)):
        yield _attention(*sizes, "bf16")
    yield _ones()
    if rare:
        yield from _rare()


def _rare() -> Iterator[Case]:
    for patches in (256, 1024, 2048):
        yield _masks(patches)
    yield from _crops(13)
    for channels, patch, side in ((1, 4, 28), (13, 16, 224), (3, 14, 98), (3, 64, 256)):
        yield _patches(channels, patch, side, "uint8", "bf16", norm_pix=True)
    yield _patches(3, 16, 224, "fp32", "fp32", norm_pix=True)
    yield _patches(3, 16, 224, "bf16", "bf16", norm_pix=False)
    yield _patches(3, 14, 224, "fp16", "fp16", norm_pix=False)
    for width, dtype, has_fill in ((512, "fp32", True), (1280, "fp32", False), (192, "fp16", False)):
        yield _rows(width, dtype, has_fill)
    for width, dtype, out in ((512, "fp32", "fp32"), (256, "fp16", "fp32")):
        yield _sequence(width, dtype, out)
    for width in (192, 256, 384, 1024, 4096):
        yield _norm(width, "fp32", "bf16")
    for width, residual, branch in ((512, "bf16", "bf16"), (1280, "bf16", "bf16"), (768, "fp32", "fp16"), (768, "fp32", None)):
        yield _norm(width, residual, branch)
    for width, dtype in ((768, "bf16"), (5120, "fp16"), (3072, "fp32")):
        yield _gelu(width, dtype)
    for sizes, dtype in (((257, 257, 32), "bf16"), ((192, 257, 32), "bf16"), ((197, 197, 64), "fp16"), ((50, 50, 64), "fp32"),
                         ((197, 197, 32), "fp32")):  # fmt: skip
        yield _attention(*sizes, dtype)


def _step(model: str, layout: str, residual: str) -> Case:
    """A training step under autocast: every op by the model itself. One block of each kind, for blocks launch nothing here."""
    config = preset(model, norm_pix_loss=True, depth=1, decoder_depth=1, residual=residual)
    memory_format = torch.channels_last if layout == "NHWC" else torch.contiguous_format  # as crops of the CPU, of the GPU
    images = _images(config.in_chans, config.img_size[0], "uint8").contiguous(memory_format=memory_format)
    net, masking = MAE(config), random_masking(_B, config.patches, 0.75, seed=0)

    def call() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = net.training_loss(images, masking)
        loss.backward()

    return f"step {model} {layout} residual {residual}", call


def _masks(patches: int) -> Case:
    epochs, kept = torch.zeros(_B, dtype=torch.int64), patches // 4
    return f"L{patches}", partial(kernels.random_masking, 0, epochs, torch.arange(_B), patches, kept, patches - kept)


def _crops(channels: int) -> Iterator[Case]:
    """Crops as the loader makes them."""
    side = 224
    pixels = torch.zeros(_B * 256 * 256 * channels, dtype=torch.uint8)
    boxes = torch.tensor([[0, 0, 200, 180]] * _B, dtype=torch.int32)
    images = (pixels, torch.arange(_B) * 256 * 256 * channels, torch.full((_B,), 256).int(), boxes, torch.arange(_B) > 0)
    yield f"C{channels}", partial(kernels.resized_crop, *images, (side, side), channels)


def _patches(channels: int, patch: int, side: int, pixels: str, compute: str, *, norm_pix: bool) -> Case:
    """Both ops that read patches of images, of ``side`` pixels."""
    images, ids = _images(channels, side, pixels), torch.zeros(_B, 3, dtype=torch.int32)
    statistics = (torch.zeros(channels), torch.ones(channels)) if pixels == "uint8" else (None, None)
    pred = torch.zeros(_B, 3, channels * patch**2, dtype=_DTYPES[compute], requires_grad=True)

    def call() -> None:
        kernels.gather_patches(images, ids, patch, *statistics, _DTYPES[compute])
        kernels.masked_mse(pred, images, ids, patch, norm_pix, *statistics).backward()

    return f"C{channels} p{patch} {side} px {pixels} {compute}{'' if norm_pix else ' plain'}", call


def _rows(width: int, dtype: str, has_fill: bool) -> Case:
    """The shuffle or, with a mask token to fill holes with, the unshuffle."""
    ids_keep, ids_restore = torch.zeros(_B, _K, dtype=torch.int32), torch.zeros(_B, _L, dtype=torch.int32)
    x = torch.zeros(_B, _K if has_fill else _L, width, dtype=_DTYPES[dtype], requires_grad=True)
    fill = torch.zeros(width, dtype=_DTYPES[dtype], requires_grad=True) if has_fill else None
    ids = (ids_restore, ids_keep) if has_fill else (ids_keep, ids_restore)

    def call() -> None:
        kernels.take_rows(x, *ids, fill).sum().backward()

    return f"D{width} {dtype}{' fill' if has_fill else ''}", call


def _sequence(width: int, dtype: str, out: str) -> Case:
    """The decoder's input at one width and pair of dtypes."""
    x = torch.zeros(_B, 1 + _K, width, dtype=_DTYPES[dtype], requires_grad=True)
    token, positions = torch.zeros(width, requires_grad=True), torch.zeros(1 + _L, width)
    ids_keep, ids_predict = torch.zeros(_B, _K, dtype=torch.int32), torch.zeros(_B, _L - _K, dtype=torch.int32)

    def call() -> None:
        kernels.decoder_input(x, token, positions, ids_keep, ids_predict, _DTYPES[out]).sum().backward()

    return f"D{width} {dtype} {out}", call


def _norm(width: int, residual: str, branch: str | None) -> Case:
    """A residual addition and the norm after it, or a norm alone, in the dtypes of the stream and of the branch."""
    x = torch.zeros(_B, 1 + _K, width, dtype=_DTYPES[residual], requires_grad=True)
    added = None if branch is None else torch.zeros_like(x, dtype=_DTYPES[branch]).requires_grad_()
    weight, bias, branch_bias = torch.zeros(3, width, requires_grad=True).unbind(0)

    def call() -> None:
        total, normed = kernels.add_norm(
            x, added, weight, bias, 1e-6, None if added is None else branch_bias, _DTYPES[branch or "bf16"]
        )
        (total.sum() + normed.sum()).backward()

    return f"D{width} {residual} {branch or 'alone'}", call


def _gelu(width: int, dtype: str) -> Case:
    x = torch.zeros(_B, 1 + _K, width, dtype=_DTYPES[dtype], requires_grad=True)
    bias = torch.zeros(width, requires_grad=True)
    return f"D{width} {dtype}", lambda: kernels.gelu(x, bias).sum().backward()


def _attention(N: int, M: int, d: int, dtype: str) -> Case:
    """Two heads with ``d`` channels each, of N queries over M keys; of packed queries if these are as many."""
    packed = torch.zeros(_B, M, 3 if N == M else 2, 2, d, dtype=_DTYPES[dtype], requires_grad=True)
    q = None if N == M else torch.zeros(_B, N, 2, d, dtype=_DTYPES[dtype], requires_grad=True)
    bias = torch.zeros(6 * d, requires_grad=True)
    return f"{N} over {M} d{d} {dtype}", lambda: kernels.short_attention(packed, q, bias).sum().backward()


def _ones() -> Case:
    """Sizes of 1, which Triton makes constants, in every argument."""
    images, ids, epochs = _images(1, 1, "uint8"), torch.zeros(_B, 1, dtype=torch.int32), torch.zeros(_B, dtype=torch.int64)
    x, token = torch.zeros(_B, 2, 1, requires_grad=True), torch.zeros(1, requires_grad=True)
    crops = (images.flatten(), torch.arange(_B), torch.ones(_B).int(), torch.tensor([[0, 0, 1, 1]] * _B).int(), epochs > 0)

    def call() -> None:
        kernels.random_masking(1, epochs, epochs, 2, 1, 1)
        kernels.resized_crop(*crops, (1, 1), 1)
        kernels.gather_patches(images, ids, 1, *torch.ones(2, 1))
        kernels.masked_mse(x[:, :1], images, ids, 1, False, *torch.ones(2, 1)).backward()
        kernels.take_rows(x[:, :1], ids, ids, token).sum().backward()
        kernels.decoder_input(x, token, torch.zeros(3, 1), ids, ids).sum().backward()
        sum(kernels.add_norm(x[:1, :1], x[:1, 1:], token, token, 1e-6, token)).sum().backward()
        kernels.gelu(x[:1, :1], token).sum().backward()
        kernels.short_attention(torch.zeros(1, 1, 3, 1, 1, requires_grad=True), keys=ids[0]).sum().backward()

    return "ones", call


def _images(channels: int, side: int, dtype: str) -> Tensor:
    return torch.zeros(_B, channels, side, side, dtype=_DTYPES[dtype])
