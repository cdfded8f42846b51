"""From work and bytes to milliseconds: a simple model with stated rates. No value was measured by a committed result.

product     waves of tiles, each of which does its share of the multiply-adds and a prologue; the best of a few tile sizes
            and splits of the inner dimension; at least the time of its bytes
attention   the products of whole tiles of the attention matrix at a share of the products' peak; at least the time of its
            bytes: tiles of FlashAttention 2 (``flash_padded``) and of our kernel (``attention_tiles.padded_flops``)
the rest    its bytes at a share of the memory's rate, less where it has fewer blocks than there are multiprocessors
all         and a fixed time for each launch
"""

import math
from dataclasses import dataclass, fields

from fastmae.benchmarks.traffic.gpus import GPU
from fastmae.benchmarks.traffic.kernel import Attention, Kernel, Product
from fastmae.errors import InputError
from fastmae.kernels.attention_tiles import padded_flops

# Rows and columns of a product's tile, and its rate beside that of the largest.
_TILES = ((128, 256, 1.0), (256, 128, 1.0), (192, 128, 0.95), (128, 128, 0.88), (64, 256, 0.82))
_SPLITS, _LEAST_INNER = (1, 2, 4, 8, 16), 256
_PROLOGUE = 96  # filling and draining the pipeline of a tile costs as much as so many steps of the inner dimension


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What the model assumes of every GPU."""

    product_share: float = 0.8
    """Share of the data sheet's bf16 rate that a tile of the largest size reaches: 790 of 989 TFLOP/s on an H100;
    an assumption."""
    memory_share: float = 0.82
    """Share of the memory's rate that kernels reach: 2.75 of 3.35 TB/s on an H100; an assumption."""
    flash_forward: float = 0.4
    """Share of the data sheet's rate at which FlashAttention 2 works on its own tiles; an assumption."""
    flash_backward: float = 0.3
    """The same of its backward pass, which computes five products for the forward's two; an assumption."""
    short_forward: float = 0.3
    """Share at which ``short_attention`` works on its own tiles; an assumption."""
    short_backward: float = 0.2
    """The same of its backward pass, of five products or, past 64 tokens or channels, of seven; an assumption."""
    launch: float = 1.5e-6
    """Seconds of a kernel beyond its work, from the last byte of the one before to its own first; an assumption."""

    def __post_init__(self):
        for field in fields(self):
            if not 0 < getattr(self, field.name) <= 1:
                raise InputError(f"{field.name} must lie in (0, 1], got {getattr(self, field.name)}")


def seconds(kernel: Kernel, gpu: GPU, rates: Rates) -> float:
    """Predicted time of a kernel, or of an operator's launches."""
    moving = kernel.bytes / (gpu.memory_bytes * rates.memory_share)
    start = kernel.launches * rates.launch
    if isinstance(kernel.work, Product):
        return start + max(moving, product_seconds(kernel.work, gpu, rates))
    if isinstance(kernel.work, Attention):
        return start + attention_seconds(kernel.work, moving, gpu, rates)
    return start + moving * max(1.0, gpu.processors / (kernel.blocks or gpu.processors))


def product_seconds(product: Product, gpu: GPU, rates: Rates) -> float:
    """Of the arithmetic, by the best tile and split."""
    batch, rows, columns, inner = product
    per_processor = gpu.flops * rates.product_share / gpu.processors
    best = math.inf
    for height, width, rate in _TILES:
        tiles = batch * math.ceil(rows / height) * math.ceil(columns / width)
        for split in _SPLITS:
            if split > 1 and inner / split < _LEAST_INNER:
                continue
            waves = math.ceil(tiles * split / gpu.processors)
            time = waves * 2 * height * width * (inner / split + _PROLOGUE) / (per_processor * rate)
            if split > 1:  # float32 parts are written and read again, mostly in the cache
                time += batch * rows * columns * 4 * split * 2 / (1.5 * gpu.memory_bytes * rates.memory_share)
            best = min(best, time)
    return best


def attention_seconds(work: Attention, moving: float, gpu: GPU, rates: Rates) -> float:
    """``moving``: seconds of reading its inputs and writing its outputs once."""
    share = {(False, False): rates.flash_forward, (False, True): rates.flash_backward, (True, False): rates.short_forward,
             (True, True): rates.short_backward}[work.is_whole, work.is_backward]  # fmt: skip
    extra = 0.0
    if work.is_whole:
        flops = padded_flops(work.queries, work.keys, work.head_dim)[work.is_backward]
    else:
        queries, keys, channels = flash_padded(work)
        flops = 2 * (5 if work.is_backward else 2) * queries * keys * channels
    if work.is_backward and not work.is_whole:  # a pass over both outputs before, and one that rounds float32 dq after it
        rows = work.images * work.heads * work.head_dim
        extra = rows * (2 * 2 * work.queries + 2 * 4 * queries + 2 * work.queries) / (gpu.memory_bytes * rates.memory_share)
    computing = work.images * work.heads * flops / (gpu.flops * share)
    return max(computing, moving) + extra


def flash_padded(work: Attention) -> tuple[int, int, int]:
    """Queries, keys and channels that FlashAttention 2 computes for a head, by the tiles that it launches on these GPUs."""
    channels = math.ceil(work.head_dim / 32) * 32
    rows, columns = (128, 128) if channels <= 64 else (64, 128) if work.is_backward else (128, 64)
    return math.ceil(work.queries / rows) * rows, math.ceil(work.keys / columns) * columns, channels
