"""Scaled dot-product attention behind one function, whoever computes it.

    out[b, n, h] = sum_m softmax_m(q[b, n, h] . k[b, m, h] / sqrt(d)) v[b, m, h]

B images, N queries, M keys, H heads of d channels. A backend is chosen by name; ``auto`` is xformers on CUDA where a probe
shows that it works, else torch's own choice among its SDPA kernels.
"""

import contextlib
import functools
import logging
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastmae.errors import InputError
from fastmae.optional import require

BACKENDS = ("auto", "xformers", "sdpa", "flash", "cudnn", "efficient", "math")
"""``sdpa`` leaves the choice to torch; ``flash``, ``cudnn``, ``efficient`` and ``math`` are its kernels by name."""

_SDPA = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


def attention(q: Tensor, k: Tensor, v: Tensor, backend: str = "auto") -> Tensor:
    """Attention of ``q`` (B, N, H, d) over ``k`` and ``v`` (B, M, H, d): (B, N, H, d), same dtype; no mask, no dropout.

    Raises InputError on an unknown backend, RuntimeError where a backend chosen by name does not work on these tensors.
    """
    backend = resolve(backend, q.device.type, q.dtype, q.shape[-1])
    if backend == "xformers":
        return _memory_efficient_attention(q, k, v)
    with sdpa_kernel(_SDPA[backend]) if backend in _SDPA else contextlib.nullcontext():
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return out.transpose(1, 2)


@torch.compiler.assume_constant_result  # decided, and xformers imported, outside the graph
def resolve(backend: str, device_type: str, dtype: torch.dtype, head_dim: int) -> str:
    """The backend that ``backend`` stands for on these tensors: itself, or what ``auto`` chooses.

    Raises InputError on an unknown name.
    """
    if backend not in BACKENDS:
        raise InputError(f"attention backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "auto":
        is_good = device_type == "cuda" and why_not("xformers", device_type, dtype, head_dim) is None
        backend = "xformers" if is_good else "sdpa"
    if backend == "xformers":
        _import_xformers()
    return backend


@functools.cache
def why_not(backend: str, device_type: str, dtype: torch.dtype, head_dim: int) -> str | None:
    """None if a small forward and backward pass works with ``backend`` on such tensors, else the reason in one line."""
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device_type, enabled=False):
            q = torch.ones(2, 5, 2, head_dim, dtype=dtype, device=device_type, requires_grad=True)
            attention(q, q, q, backend).sum().backward()
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
