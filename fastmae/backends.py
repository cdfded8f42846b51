"""Attention backends by name: xformers and torch's SDPA kernels behind one call, and a probe of which of them work here."""

import contextlib
import functools
import logging
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastmae.optional import require

_SDPA = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


def attend(q: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
    """Attention of ``q`` (B, N, H, d) over ``k`` and ``v`` (B, M, H, d) by ``backend``: (B, N, H, d), same dtype.

    Raises RuntimeError where the backend does not work on these tensors. xformers must have been ``prepare``d.
    """
    if backend == "xformers":
        return _memory_efficient_attention(q, k, v)
    with sdpa_kernel(_SDPA[backend]) if backend in _SDPA else contextlib.nullcontext():
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return out.transpose(1, 2)


def prepare(backend: str) -> None:
    """Import what ``backend`` needs. Raises InputError, with the install command, if it is missing."""
    if backend == "xformers":
        _import_xformers()


@functools.cache
def why_not(backend: str, device_type: str, dtype: torch.dtype, head_dim: int) -> str | None:
    """None if a small forward and backward pass works with ``backend`` on such tensors, else the reason in one line."""
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device_type, enabled=False):
            q = torch.ones(2, 5, 2, head_dim, dtype=dtype, device=device_type, requires_grad=True)
            prepare(backend)
            attend(q, q, q, backend).sum().backward()
            return None if bool(q.grad.isfinite().all()) else "it returns non-finite gradients"
    except Exception as error:  # a probe: whatever a third-party kernel raises is its answer
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


_memory_efficient_attention: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None  # xformers', once it is imported


def _import_xformers() -> None:
    # Late, because it is slow, and because its extension may not load beside this torch: it warns about that at import
    # although attention needs nothing from it. A plain global, because torch.compile can trace one and not an import.
    global _memory_efficient_attention
    if _memory_efficient_attention is None:
        logging.getLogger("xformers").setLevel(logging.ERROR)
        _memory_efficient_attention = require("xformers.ops", "attention xformers").memory_efficient_attention
