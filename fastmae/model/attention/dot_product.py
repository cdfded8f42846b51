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


def attention(q: Tensor, k: Tensor, v: Tensor, backend: str = "auto") -> Tensor:
    """Attention of ``q`` (B, N, H, d) over ``k`` and ``v`` (B, M, H, d): (B, N, H, d), same dtype; no mask, no dropout.

    Raises InputError on an unknown backend or one known to fail here, RuntimeError if one chosen by name does not work.
    """
    # The batch may be dynamic in a compiled graph, these not: the length of a range is a constant there.
    N, M, H, d = (len(range(size)) for size in (q.shape[1], k.shape[1], q.shape[2], q.shape[3]))
    return attend(q, k, v, _resolve_outside_graph(backend, q.device.type, q.dtype, N, M, H, d))


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
