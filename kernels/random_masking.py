"""Random masks: keys from a counter-based generator, sorted, in one launch.

    key[b, l] = Philox4x32-10(seed; draw l of stream MASKS, epoch[b], sample id[b])
    ids_shuffle[b] = argsort(key[b]);            ids_restore[b] = argsort(ids_shuffle[b])
    ids_keep = ids_shuffle[:, :K];               ids_predict = ids_shuffle[:, K : K + Q]

B images, L patches each, K kept, Q predicted. A key is packed above its patch's index and the pair is sorted as one integer:
no two are equal, so every sort gives the same order, and kernel and twin agree bit for bit. The op reads its counters from
device memory and uses no generator's state, so a CUDA graph that contains it draws new masks at each replay.
Source: He et al. 2021 (arXiv 2111.06377), section 3 "Masking".
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmae.kernels.dispatch import use_triton, warps
from fastmae.kernels.philox import MASKS, random_words

_INDEX_BITS = 24  # of a patch, below its key
_LARGEST_SORT = 2048  # patches that one program sorts; more would take long to compile, and run in the twin


def random_masking(
    seed: int, epochs: Tensor, sample_ids: Tensor, patches: int, kept: int, predicted: int
) -> tuple[Tensor, Tensor, Tensor]:
    """``ids_keep`` (B, K), ``ids_predict`` (B, Q) and ``ids_restore`` (B, L), int32, of L ``patches``.

    A pure function of (``seed``, ``epochs``, ``sample_ids``): ``seed`` modulo 2**64, ``epochs`` (B,) int64 in [0, 2**32),
    ``sample_ids`` (B,) int64. ``kept`` K and ``predicted`` Q: at least 1 each and K + Q <= L < 2**24.
    Raises ValueError on a wrong shape, dtype or number.
    """
    if not (epochs.dtype == sample_ids.dtype == torch.int64 and epochs.shape == sample_ids.shape and epochs.ndim == 1):
        raise ValueError(
            f"epochs and sample_ids must be int64 (B,), got {epochs.dtype} {tuple(epochs.shape)} and "
            f"{sample_ids.dtype} {tuple(sample_ids.shape)}"
        )
    if epochs.device != sample_ids.device:
        raise ValueError(f"epochs and sample_ids must be on one device, got {epochs.device} and {sample_ids.device}")
    if min(kept, predicted) < 1 or kept + predicted > patches or patches >= 1 << _INDEX_BITS:
        raise ValueError(
            f"kept and predicted must be at least 1 and together at most patches (below 2**24), got {kept}, {predicted} "
            f"and {patches}"
        )
    signed = (seed + 2**63) % 2**64 - 2**63  # an op's integers are signed
    return _random_masking(signed, epochs, sample_ids, patches, kept, predicted)


def random_masking_ref(
    seed: int, epochs: Tensor, sample_ids: Tensor, patches: int, kept: int, predicted: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The twin of ``random_masking``: the same arguments and bits, in plain torch."""
    index = torch.arange(patches, device=sample_ids.device)
    packed = (random_words(seed, MASKS, epochs, sample_ids, patches) << _INDEX_BITS) + index
    ids_shuffle = packed.sort(dim=1).values & (1 << _INDEX_BITS) - 1
    ids_restore = torch.empty_like(ids_shuffle).scatter_(1, ids_shuffle, index.expand_as(ids_shuffle))
    ids_keep, ids_predict, _ = ids_shuffle.split([kept, predicted, patches - kept - predicted], dim=1)
    return tuple(ids.to(torch.int32, memory_format=torch.contiguous_format) for ids in (ids_keep, ids_predict, ids_restore))


@triton.jit
def _random_masking_kernel(keep_ptr, predict_ptr, restore_ptr, epochs_ptr, samples_ptr, seed, L, K, Q,
                           STREAM: tl.constexpr, INDEX_BITS: tl.constexpr, BLOCK_L: tl.constexpr):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)  # one program per image
    index = tl.arange(0, BLOCK_L)
    sample = tl.load(samples_ptr + b)
    epoch = tl.load(epochs_ptr + b).to(tl.uint32)
    draw = ((STREAM << 24) + index).to(tl.uint32)
    zero = tl.zeros([BLOCK_L], tl.uint32)
    word, _, _, _ = tl.philox(seed, draw, zero + epoch, zero + sample.to(tl.uint32), zero + (sample >> 32).to(tl.uint32))
    packed = (word.to(tl.int64) << INDEX_BITS) | index
    packed = tl.sort(tl.where(index < L, packed, 1 << 62))
    patch = (packed & ((1 << INDEX_BITS) - 1)).to(tl.int32)
    tl.store(keep_ptr + b * K + index, patch, mask=index < K)
    tl.store(predict_ptr + b * Q + index - K, patch, mask=(index >= K) & (index < K + Q))
    tl.store(restore_ptr + b * L + patch, index, mask=index < L)


def _random_masking_triton(
    seed: int, epochs: Tensor, sample_ids: Tensor, patches: int, kept: int, predicted: int
) -> tuple[Tensor, Tensor, Tensor]:
    B = len(sample_ids)
    ids = tuple(torch.empty(B, n, dtype=torch.int32, device=sample_ids.device) for n in (kept, predicted, patches))
    block = max(16, triton.next_power_of_2(patches))  # half as many warps spill on an A100 or H100 at 2048 patches
    if B:
        with torch.cuda.device_of(sample_ids):
            _random_masking_kernel[(B,)](
                *ids, epochs.contiguous(), sample_ids.contiguous(), seed, patches, kept, predicted,
                STREAM=MASKS, INDEX_BITS=_INDEX_BITS, BLOCK_L=block, num_warps=warps(4 * block),
            )  # fmt: skip
    return ids


@torch.library.custom_op("fastmae::random_masking", mutates_args=())
def _random_masking(
    seed: int, epochs: Tensor, sample_ids: Tensor, patches: int, kept: int, predicted: int
) -> tuple[Tensor, Tensor, Tensor]:
    by_kernel = use_triton(sample_ids) and patches <= _LARGEST_SORT
    body = _random_masking_triton if by_kernel else random_masking_ref
    return body(seed, epochs, sample_ids, patches, kept, predicted)


@_random_masking.register_fake
def _(seed, epochs, sample_ids, patches, kept, predicted):
    B = sample_ids.shape[0]
    return tuple(sample_ids.new_empty(B, n, dtype=torch.int32) for n in (kept, predicted, patches))
