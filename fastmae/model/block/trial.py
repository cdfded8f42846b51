"""Measure what is worth fusing in a block on this device: compiled, forward and backward, on the shapes of a run.

It starts from torch's own operations and the attention that is fastest by itself. Then another backend of attention, and each
operation of ``config.FUSED``, is tried on top of what has been taken: it is taken if results and gradients agree with those of
the plain block and the pass is faster. The result is kept on disk for this device and these versions
(``fastmae.model.attention.cache``).
"""

import contextlib
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastmae.model.attention.backends import Shape, prepare
from fastmae.model.attention.cache import BLOCKS, read_entries, write_entries
from fastmae.model.attention.choice import adopt, fastest, seconds
from fastmae.model.attention.probe import why_not
from fastmae.model.block.block import Block
from fastmae.model.block.choice import BlockShape, adopt_fused
from fastmae.model.config import BACKENDS, FUSED

_TOKENS = 65_536  # of a timed batch: enough work to hide launches
_ROUNDS, _CALLS = 5, 8  # interleaved rounds, and calls in each
_TOLERANCE = 2e-2  # relative, against the plain block in eager mode: several roundings of bf16, far below any mistake
_LEAST = 0.99  # of the time of what has been taken, so that noise alone takes nothing


class Variant(NamedTuple):
    """One way to compute a block."""

    attention: str
    fused: tuple[str, ...] = ()

    def __str__(self) -> str:
        return " + ".join((f"attention {self.attention}", *self.fused))


class Found(NamedTuple):
    """The fastest variant of a block of one shape."""

    best: Variant
    microseconds: dict[str, float]
    """Of each variant that was timed: the median of its rounds."""
    rejected: dict[str, str]
    """Variants that were not timed, and why."""


def choose_blocks(device_type: str, dtype: torch.dtype, residual: torch.dtype, shapes: Iterable[BlockShape],
                  attention: str) -> dict[BlockShape, tuple[str, ...]]:  # fmt: skip
    """What is fused in blocks of ``shapes`` from now on: known from the disk, or measured now.

    ``attention``: ``ModelConfig.attention``; with auto the backend is chosen again, as part of the block.
    """
    known, chosen = read_entries(device_type, BLOCKS), {}
    for shape in shapes:
        key = f"{dtype}, residual {residual}, attention {attention}: {shape}"
        if (best := _known(known.get(key), device_type, dtype, shape)) is None:
            found = measure_block(device_type, dtype, residual, shape, attention)
            best = found.best
            write_entries(device_type, BLOCKS, {key: {**found._asdict(), "best": list(best)}})
        chosen[shape] = best.fused
        if attention == "auto":
            adopt(device_type, dtype, {_attention_of(shape): best.attention})
    adopt_fused(device_type, dtype, residual, chosen)
    return chosen


def measure_block(device_type: str, dtype: torch.dtype, residual: torch.dtype, shape: BlockShape, attention: str,
                  tokens: int = _TOKENS) -> Found:  # fmt: skip
    """The fastest variant of a block of ``shape``, over about ``tokens`` tokens."""
    backends = [fastest(device_type, dtype, _attention_of(shape)), "short"] if attention == "auto" else [attention]
    backends = [b for b in dict.fromkeys(backends) if why_not(b, device_type, dtype, _attention_of(shape)) is None]
    trial = _Trial(device_type, dtype, residual, shape, max(1, tokens // shape.tokens))
    best, rejected, times = Variant(backends[0] if backends else attention), {}, {}
    with torch.inference_mode(False), torch.enable_grad():
        exact = trial.eager(best)
        run = trial.compiled(best)
        for change in (*backends[1:], *FUSED):
            other = Variant(change, best.fused) if change in BACKENDS else Variant(best.attention, (*best.fused, change))
            try:
                candidate = trial.compiled(other)
                error = _error(candidate(), exact)
                if error > _TOLERANCE:
                    raise ArithmeticError(f"differs from the plain block by {error:.1g} of its norm")
                pair = _in_turns([run, candidate], device_type)
            except Exception as failure:  # whatever a compiler or kernel raises is the verdict on the variant
                rejected[str(other)] = f"{type(failure).__name__}: {' '.join(str(failure).split())[:300]}"
                continue
            for variant, taken in zip((best, other), pair, strict=True):
                times[str(variant)] = 1e6 * statistics.median(taken)
            if statistics.median(b / a for a, b in zip(*pair, strict=True)) < _LEAST:
                best, run = other, candidate
    del trial, run, exact
    if device_type == "cuda":
        torch.cuda.empty_cache()  # which a step needs
    return Found(best, {name: round(t, 1) for name, t in times.items()}, rejected)


class _Trial:
    """A block of random weights, a batch, and the gradient of its results; ``B`` images."""

    def __init__(self, device_type: str, dtype: torch.dtype, residual: torch.dtype, shape: BlockShape, B: int):
        self._device, self._dtype, self._shape = device_type, dtype, shape
        generator = torch.Generator(device_type).manual_seed(0)  # its own, so that later draws do not change

        def draw(*sizes: int, dtype: torch.dtype = residual) -> Tensor:
            return torch.randn(*sizes, device=device_type, dtype=dtype, generator=generator)

        N, first, D, *_ = shape
        self._inputs = draw(B, N, D).requires_grad_(), draw(B, N, D, dtype=dtype).requires_grad_()
        self._gradients = draw(B, N - first, D), draw(B, N - first, D, dtype=dtype)
        with torch.random.fork_rng(devices=[device_type] if device_type == "cuda" else []):
            self._weights = Block(D, shape.heads, shape.hidden / D, "math").to(device_type).state_dict()

    def eager(self, variant: Variant) -> list[Tensor]:
        """Results and gradients of the block without a compiler."""
        block = self._block(variant)
        return self._pass(block, block)

    def compiled(self, variant: Variant) -> Callable[[], list[Tensor]]:
        """A pass of the compiled block, forward and backward."""
        prepare(variant.attention)
        block = self._block(variant)
        call = torch.compile(block, dynamic=False)
        return lambda: self._pass(block, call)

    def _block(self, variant: Variant) -> Block:
        _, _, D, heads, hidden = self._shape
        with torch.random.fork_rng(devices=[]):
            block = Block(D, heads, hidden / D, variant.attention, ",".join(variant.fused) or "off").to(self._device)
        block.load_state_dict(self._weights)
        return block

    def _pass(self, block: Block, call: Callable) -> list[Tensor]:
        is_low = self._dtype != torch.float32
        with torch.autocast(self._device, dtype=self._dtype if is_low else None, enabled=is_low):
            x, branch, _ = call(*self._inputs, None, self._shape.first)
        wanted = [*self._inputs, *(p for name, p in block.named_parameters() if name != "mlp.fc2.bias")]
        return [x.detach(), branch.detach(), *torch.autograd.grad([x, branch], wanted, list(self._gradients))]


def _in_turns(runs: Sequence[Callable], device_type: str) -> list[list[float]]:
    """Seconds of a call of each run, in each round."""
    for run in runs:
        seconds(run, device_type, 2)
    rounds = [[seconds(run, device_type, _CALLS) for run in runs] for _ in range(_ROUNDS)]
    return [list(taken) for taken in zip(*rounds, strict=True)]


def _error(found: list[Tensor], exact: list[Tensor]) -> float:
    """The largest distance of a result or gradient from the exact one, over its norm; infinity if one is not finite."""
    errors = [float((f.float() - e.float()).norm() / e.float().norm()) for f, e in zip(found, exact, strict=True)]
    return max(error if math.isfinite(error) else math.inf for error in errors)


def _attention_of(shape: BlockShape) -> Shape:
    return Shape(shape.tokens - shape.first, shape.tokens, shape.heads, shape.dim // shape.heads)


def _known(entry: dict | None, device_type: str, dtype: torch.dtype, shape: BlockShape) -> Variant | None:
    """The variant that an entry of the disk cache names, if it can be used."""
    with contextlib.suppress(KeyError, TypeError, ValueError):
        attention, fused = entry["best"]
        if set(fused) <= set(FUSED) and why_not(attention, device_type, dtype, _attention_of(shape)) is None:
            return Variant(attention, tuple(fused))
    return None
