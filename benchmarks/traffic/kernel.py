"""What a step launches: a kernel, or what one operator launches, with the bytes that it must move and the work that it does."""

import math
import re
from typing import NamedTuple

from fastmae.benchmarks.training.kinds import kind_of

CHUNK = 65536  # elements of a tensor that a block of torch's multi_tensor_apply works on


class Product(NamedTuple):
    """``batch`` matrix products, (rows, inner) by (inner, columns)."""

    batch: int
    rows: int
    columns: int
    inner: int

    @property
    def flops(self) -> int:
        """2 FLOP a multiply-add."""
        return 2 * math.prod(self)


class Attention(NamedTuple):
    """Fused attention of ``queries`` over ``keys``, forward or backward."""

    images: int
    heads: int
    queries: int
    keys: int
    head_dim: int
    is_backward: bool
    is_whole: bool
    """Whether a program holds the whole sequence (``short_attention``), rather than tiles of it (flash attention)."""


class Kernel(NamedTuple):
    """One compiled kernel, or one operator with all that it launches."""

    names: tuple[str, ...]
    """Of the launches, as a profiler gives them."""
    bytes: int
    """Read and written: each tensor, or the part of it that is touched, once."""
    does: tuple[str, ...] = ()
    """The operators that it serves."""
    tensors: tuple[str, ...] = ()
    """What it reads and writes, dtype and shape."""
    is_backward: bool = False
    is_small: bool = False
    """Whether nothing in it grows with the batch: weights and their gradients."""
    work: Product | Attention | None = None
    blocks: int | None = None
    """Of the launch, where they may be fewer than a GPU has multiprocessors."""

    @property
    def launches(self) -> int:
        """Of kernels. Torch's flash attention launches three in its backward pass: dot products of output and gradient, the
        gradients, and the rounding of dq."""
        is_flash = isinstance(self.work, Attention) and not self.work.is_whole and self.work.is_backward
        return len(self.names) + 2 * is_flash

    @property
    def without_number(self) -> "Kernel":
        """Equal for kernels that differ in the number which Inductor gives to each: ``triton_poi_fused_gelu_view_8``."""
        return self._replace(names=tuple(re.sub(r"^(triton_\w+?)_\d+$", r"\1_0", name) for name in self.names))

    @property
    def kind(self) -> str:
        """One of ``kinds.KINDS``, by the name of the first launch, as in the profiler's table."""
        return kind_of(self.names[0])

    @property
    def group(self) -> str:
        """Its kind, and what the names of these do not tell: of which pass they are, or of what."""
        kind = self.kind
        if kind in ("norms", "GELU"):
            return f"{kind}, {'backward' if self.is_backward else 'forward'}"
        return f"{kind}, {'weights' if self.is_small else 'activations'}" if kind == "casts" else kind
