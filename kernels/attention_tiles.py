"""How short attention divides its tokens: blocks of rows that a program works on, tiles of columns that pass by them.

Sizes are powers of two for Triton, and at least 16 for tensor cores. Rows are blocks of one size and a smaller one at the end,
so that 50, 65, 197 and 257 tokens take 64, 80, 208 and 272 rows, not 64, 128, 256 and 512. Nothing here was measured: sizes are
those at which no kernel spills registers (``fastmae bench kernels --resources``).
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

SINGLE = 64  # tokens and channels up to which a backward pass is one tile, without loops; half the channels in float32


class Tiles(NamedTuple):
    """A loop nest: rows in ``blocks`` blocks of ``rows`` and one of ``tail`` (0: none), columns in tiles of ``columns``."""

    blocks: int
    rows: int
    tail: int
    columns: int
    warps: int
    registers: int | None = None
    """Most of a thread, where the compiler would rather spill a few than use more; None: as it likes."""

    def padded(self, columns: int) -> int:
        """Scores computed for so many columns, with those that are padding."""
        return (self.blocks * self.rows + self.tail) * triton.cdiv(columns, self.columns) * self.columns


def forward_tiles(N: int, M: int, d: int, itemsize: int) -> Tiles:
    """Rows are N queries, columns M keys, of ``d`` channels of ``itemsize`` bytes."""
    if itemsize == 4:
        return _tiles(N, M, 32, 32, 4, 168) if d <= 64 else _tiles(N, M, 32, 16, 8, 168)
    return _tiles(N, M, 64, 64 if M <= 64 else 32, 4) if d <= 64 else _tiles(N, M, 64, 32, 8)


def backward_tiles(rows: int, columns: int, d: int, itemsize: int) -> Tiles:
    """Of either loop nest: rows are queries and columns keys, or rows are keys and columns queries."""
    if itemsize == 4:
        return _tiles(rows, columns, 32, 32 if d <= 32 else 16, 4, 255) if d <= 64 else _tiles(rows, columns, 16, 16, 8, 255)
    return _tiles(rows, columns, 64, 32, 4, 168 if d <= 32 else 255) if d <= 64 else _tiles(rows, columns, 32, 16, 8, 255)


def is_single(N: int, M: int, d: int, itemsize: int = 2) -> bool:
    """Whether the backward pass of N queries and M keys is one tile."""
    return max(N, M, d * itemsize // 2) <= SINGLE


def padded_flops(N: int, M: int, d: int, itemsize: int = 2) -> tuple[int, int]:
    """FLOPs of the products of one head of one image, forward and backward, padding included.

    Two products forward; backward five where everything is one tile, else seven: scores and their gradients are made twice.
    """
    of_one = 2 * width(d)
    forward = 2 * of_one * forward_tiles(N, M, d, itemsize).padded(M)
    if is_single(N, M, d, itemsize):
        return forward, 5 * of_one * width(N) * width(M)
    queries, keys = backward_tiles(N, M, d, itemsize).padded(M), backward_tiles(M, N, d, itemsize).padded(N)
    return forward, of_one * (3 * queries + 4 * keys)


def width(size: int) -> int:
    """The block that holds ``size`` tokens or channels."""
    return max(16, triton.next_power_of_2(size))


def _tiles(rows: int, columns: int, most_rows: int, most_columns: int, warps: int, registers: int | None = None) -> Tiles:
    blocks, rest = divmod(rows, most_rows)
    tail = width(rest) if rest else 0
    if tail == most_rows:
        blocks, tail = blocks + 1, 0
    return Tiles(blocks, most_rows, tail, min(most_columns, width(columns)), warps, registers)


def dense(x: Tensor | None) -> Tensor | None:
    """``x`` as ``load_rows`` reads it: the channels of a head (or images' counts of keys) side by side, and the tokens of an
    image within 2**31 elements."""
    if x is None or (x.stride(-1) == 1 and (x.ndim == 1 or x.stride(1) * x.shape[1] < 2**31)):
        return x
    return x.contiguous()


@triton.jit
def load_rows(ptr, first, rows, stride, D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """``ROWS`` rows of D channels from row ``first``; 0 from row ``rows`` on."""
    r, d = first + tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    return tl.load(ptr + r[:, None] * stride + d[None, :], mask=(r < rows)[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def store_rows(ptr, x, first, rows, stride, D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Store ``x`` as rows from ``first`` on, but none from ``rows`` on."""
    r, d = first + tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    x = x.to(ptr.dtype.element_ty)
    tl.store(ptr + r[:, None] * stride + d[None, :], x, mask=(r < rows)[:, None] & (d < D)[None, :])
