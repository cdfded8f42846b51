"""Counter-based random numbers: the same bits for the same key and counter on any device, in any order.

    (r0, r1, r2, r3) = Philox4x32-10(key, counter)         uniform = (r0 >> 8) / 2**24,  in [0, 1)

Everything random in fastmae (order, crops, masks) is a pure function of (seed, stream, epoch, sample id, draw): it does not
depend on a generator's state, the worker count or the world size. Source: Salmon et al. 2011, "Parallel random numbers:
as easy as 1, 2, 3" (SC11); the same bits as Triton's ``tl.philox``.
"""

import torch
from torch import Tensor

# A stream for each purpose, so that draws under one seed are independent; a value is never reused.
ORDER, CROPS, MASKS, SHARDS, WINDOWS = 1, 2, 3, 4, 5

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF


def philox4x32(
    key: tuple[int, int], counter: tuple[Tensor | int, Tensor | int, Tensor | int, Tensor | int], rounds: int = 10
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four random words, int64 tensors in [0, 2**32), of the counters' broadcast shape.

    ``key`` holds two 32-bit integers; each of the four ``counter`` words is an int64 tensor (or an int) in [0, 2**32).
    At least one counter word must be a tensor.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        # int64 products wrap modulo 2**64, which leaves all 64 bits right; the mask undoes the arithmetic shift's sign.
        low0, low2 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (low2 >> 32) & _LOW ^ c1 ^ k0,
            low2 & _LOW,
            (low0 >> 32) & _LOW ^ c3 ^ k1,
            low0 & _LOW,
        )
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return tuple(torch.broadcast_tensors(*(torch.as_tensor(c) for c in (c0, c1, c2, c3))))


def random_words(seed: int, stream: int, epochs: Tensor | int, sample_ids: Tensor, draws: int) -> Tensor:
    """``draws`` words (fewer than 2**24) per sample: (B, draws) int64 in [0, 2**32).

    ``sample_ids`` (B,) int64; ``epochs`` (B,) integers, or one for all.
    Key: the seed's two words. Counter: (stream in the top 8 bits and draw below, epoch, sample id low word, high word).
    """
    ids = sample_ids.to(torch.int64)[:, None]
    if isinstance(epochs, Tensor):
        epochs = epochs.to(device=ids.device, dtype=torch.int64)[:, None]
    draw = (stream << 24) + torch.arange(draws, device=ids.device)[None, :]
    return philox4x32((seed & _LOW, seed >> 32 & _LOW), (draw, epochs, ids & _LOW, (ids >> 32) & _LOW))[0]


def uniform(seed: int, stream: int, epochs: Tensor | int, sample_ids: Tensor, draws: int) -> Tensor:
    """``draws`` numbers per sample in [0, 1), (B, draws) float32, each a multiple of 2**-24; arguments as ``random_words``."""
    return (random_words(seed, stream, epochs, sample_ids, draws) >> 8).to(torch.float32) * 2.0**-24


def permutation(seed: int, stream: int, epoch: int, n: int) -> Tensor:
    """A random order of range(n), (n,) int64: ``n`` keys sorted, ties broken by index."""
    keys = random_words(seed, stream, epoch, torch.arange(n), 1)[:, 0]
    return torch.argsort(keys, stable=True)
