"""Attention backends by name: xformers and torch's SDPA kernels behind one call, and the known faults of some."""

import contextlib
import logging
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastmae.kernels.short_attention import MOST_CHANNELS, MOST_TOKENS, short_attention
from fastmae.model.attention.cuda_runtime import load_runtime
from fastmae.optional import require

_SDPA = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
RETURN_BIAS = ("short",)
"""Backends that return the gradient of the bias of the layer that made queries, keys and values."""
_CUDNN_TILE, _CUDNN_BROKEN = 128, (9, 15, 0)  # up to this version, lengths that are no multiple of the tile are overrun

_memory_efficient_attention: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None  # xformers', once it is imported


class Shape(NamedTuple):
    """Sizes on which it depends, besides device and dtype, which backends work and how fast they are."""

    queries: int
    keys: int
    heads: int
    head_dim: int

    def __str__(self) -> str:
        return f"{self.queries} over {self.keys} tokens, {self.heads} heads of {self.head_dim}"


def attend(packed: Tensor, q: Tensor | None, backend: str, bias: Tensor | None = None) -> Tensor:
    """Attention of ``packed`` (B, M, 3, H, d), or of ``q`` (B, N, H, d) over ``packed`` (B, M, 2, H, d), by ``backend``:
    (B, N, H, d), same dtype. ``bias`` as in ``fastmae.kernels.short_attention``, for a backend of ``RETURN_BIAS``.

    Raises RuntimeError where the backend does not work on these tensors. xformers must have been ``prepare``d.
    """
    if backend in RETURN_BIAS:
        return short_attention(packed, q, bias)
    q, k, v = packed.unbind(2) if q is None else (q, *packed.unbind(2))
    if backend == "xformers":
        return _memory_efficient_attention(q, k, v)
    with sdpa_kernel(_SDPA[backend]) if backend in _SDPA else contextlib.nullcontext():
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return out.transpose(1, 2)


def prepare(backend: str) -> None:
    """Import what ``backend`` needs. Raises InputError, with the install command, if it is missing."""
    # xformers late, because it is slow, and warns at import if its extension does not load with this torch, although attention
    # needs nothing from it. A plain global, because torch.compile can trace one and not an import.
    global _memory_efficient_attention
    if backend == "xformers" and _memory_efficient_attention is None:
        load_runtime(torch.version.cuda)
        logging.getLogger("xformers").setLevel(logging.ERROR)
        _memory_efficient_attention = require("xformers.ops", "attention xformers").memory_efficient_attention


def refusal(backend: str, device_type: str, shape: Shape) -> str | None:
    """Why ``backend`` must not even be tried on tensors of ``shape``, in one line; None if no fault is known."""
    if backend == "short" and (max(shape.queries, shape.keys) > MOST_TOKENS or shape.head_dim > MOST_CHANNELS):
        return f"it takes at most {MOST_TOKENS} tokens, and heads of at most {MOST_CHANNELS} channels"
    if device_type != "cuda":
        return None
    if backend == "xformers":
        return load_runtime(torch.version.cuda)
    if backend != "cudnn":
        return None
    try:
        version = cudnn_version()
    except RuntimeError as error:  # torch refuses a cuDNN older than the one it was built with
        return f"cuDNN cannot be used, {' '.join(str(error).split())[:300]}"
    if version is None:
        return "this torch has no cuDNN"
    if version <= _CUDNN_BROKEN and (shape.queries % _CUDNN_TILE or shape.keys % _CUDNN_TILE):
        return (
            f"cuDNN {_dotted(version)} reads out of bounds for sequence lengths that are no multiple of {_CUDNN_TILE}: "
            f"install a cuDNN newer than {_dotted(_CUDNN_BROKEN)}"
        )
    return None


def cudnn_version() -> tuple[int, int, int] | None:
    """The cuDNN that torch has loaded, which may differ from the one that a package manager lists; None without any.

    torch gives one number: 91501 is 9.15.1; up to version 8, 8902 is 8.9.2 (``CUDNN_VERSION`` of cuDNN's header).
    """
    number = torch.backends.cudnn.version()
    if number is None:
        return None
    major, rest = divmod(number, 10_000 if number >= 90_000 else 1000)
    return major, *divmod(rest, 100)


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
