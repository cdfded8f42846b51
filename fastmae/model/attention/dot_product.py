"""Scaled dot-product attention by any backend.

    out[b, n, h] = sum_m softmax_m(q[b, n, h] . k[b, m, h] / sqrt(d)) v[b, m, h]

B images, N queries, M keys, H heads of d channels. A backend is chosen by name; ``auto`` is the fastest in a short measurement
on these shapes on a GPU (``fastmae.model.attention.choice``), and torch's own choice on a CPU.
"""

import torch
from torch import Tensor

from fastmae.errors import InputError
from fastmae.model.attention.backends import Shape, attend, prepare, refusal
from fastmae.model.attention.choice import fastest
from fastmae.model.config import BACKENDS, ModelConfig

MEASURED = ("cuda",)  # device types on which auto measures; elsewhere torch's own choice is the only fast one


def attention(packed: Tensor, q: Tensor | None = None, backend: str = "auto", bias: Tensor | None = None) -> Tensor:
    """Attention of M tokens to each other, or of N queries to them: (B, N, H, d), same dtype; no mask, no dropout.

    ``packed``: queries, keys and values (B, M, 3, H, d), or, with ``q`` (B, N, H, d), keys and values (B, M, 2, H, d).
    ``bias`` (3 H d,): that of the layer that made them, detached there, if the backend returns its gradient (``RETURN_BIAS``).
    Raises InputError on an unknown backend or one known to fail here, RuntimeError if one chosen by name does not work.
    """
    M, _, H, d = packed.shape[1:]
    N = M if q is None else q.shape[1]
    return attend(packed, q, resolved(backend, packed.device.type, packed.dtype, N, M, H, d), bias)


def resolved(backend: str, device_type: str, dtype: torch.dtype, N: int, M: int, H: int, d: int) -> str:
    """As ``resolve`` for ``Shape(N, M, H, d)``, by a call that torch.compile makes while it traces."""
    # The batch may be dynamic in a compiled graph, these not: the length of a range is a constant there.
    return _resolve_outside_graph(backend, device_type, dtype, *(len(range(size)) for size in (N, M, H, d)))


def resolve(backend: str, device_type: str, dtype: torch.dtype, shape: Shape) -> str:
    """``backend``, or what ``auto`` chooses for these tensors.

    Raises InputError on an unknown name, and on a backend that is known to fail on such tensors.
    """
    if backend == "auto":
        backend = fastest(device_type, dtype, shape) if device_type in MEASURED else "sdpa"
    elif backend not in BACKENDS:
        raise InputError(f"attention backend must be one of auto, {', '.join(BACKENDS)}, got {backend!r}")
    elif reason := refusal(backend, device_type, shape):
        raise InputError(f"attention {backend} cannot be used for {shape}, {reason}; choose another backend, or auto")
    prepare(backend)
    return backend


def _resolve_outside_graph(backend: str, device_type: str, dtype: torch.dtype, N: int, M: int, H: int, d: int) -> str:
    # Plain numbers, because dynamo passes a named tuple empty.
    return resolve(backend, device_type, dtype, Shape(N, M, H, d))


# Measured, and xformers imported, while a graph is traced and not in it. This is all that torch.compiler.assume_constant_result
# does, which takes a second to import torch's compiler first.
_resolve_outside_graph._dynamo_marked_constant = True


def attention_shapes(config: ModelConfig, kept: int, predicted: int) -> list[Shape]:
    """The attention shapes of ``training_loss`` with ``kept`` visible and ``predicted`` predicted patches: encoder, decoder,
    and the decoder's last block, whose queries are the predicted patches alone."""
    encoder = (config.num_heads, config.embed_dim // config.num_heads)
    decoder = (config.decoder_num_heads, config.decoder_embed_dim // config.decoder_num_heads)
    visible, everything = 1 + kept, 1 + kept + predicted
    shapes = [Shape(visible, visible, *encoder), Shape(predicted, everything, *decoder)]
    return shapes if config.decoder_depth == 1 else [shapes[0], Shape(everything, everything, *decoder), shapes[1]]
