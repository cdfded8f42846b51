"""Self-attention of short sequences: its twin."""

import torch


def short_attention(packed, q=None, bias=None):
    if bias is not None:
        z = (bias - bias.detach()).to(packed.dtype).view(3, *packed.shape[3:])
        packed = packed + (z if q is None else z[1:])
        q = q if q is None else q + z[0]
    q, k, v = packed.unbind(2) if q is None else (q, *packed.unbind(2))
    w = torch.einsum("bnhd,bmhd->bhnm", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("bhnm,bmhd->bnhd", w.softmax(-1), v)
