"""Measure what is worth fusing in a block on this device, forward and backward, on the shapes of a run.

It starts from torch's own operations and the attention that is fastest by itself. Then each operation of ``config.FUSED``, and
our own attention, is tried on top of what has been taken: it is taken if results and gradients agree with those of the plain
block and the pass is faster. The result is kept on disk for this device and these versions
(``fastmae.model.attention.cache``).
"""

import contextlib
import statistics
from collections.abc import Callable
from typing import NamedTuple

import torch

from fastmae.errors import InputError
from fastmae.model.attention.backends import RETURN_BIAS
from fastmae.model.attention.cache import BLOCKS, read_entries, write_entries
from fastmae.model.attention.choice import adopt, fastest_alone, measures, seconds
from fastmae.model.attention.probe import why_not
from fastmae.model.attention.trial import NO_MEMORY, answers
from fastmae.model.block.choice import BlockShape, adopt_fused
from fastmae.model.block.probe import keep_fault, probe_blocks, why_not_fused
from fastmae.model.block.trial import Trial, Variant, attention_of, check
from fastmae.model.config import BACKENDS, FUSED

_TOKENS = 65_536  # of a timed batch: enough work to hide launches
_ROUNDS, _CALLS = 5, 8  # interleaved rounds, and calls in each
_LEAST = 0.99  # of the time of what has been taken, so that noise alone takes nothing


class Found(NamedTuple):
    """The fastest variant of a block of one shape."""

    best: Variant
    microseconds: dict[str, float]
    """Of each variant that was timed: the median of its rounds."""
    rejected: dict[str, str]
    """Variants that were not taken, and why."""

    @property
    def failure(self) -> str | None:
        """Why nothing could be compared; None if it could."""
        return self.rejected.get(str(self.best))

    @property
    def lasts(self) -> bool:
        """Whether another start would find the same: a lack of memory or of a compiler may be gone then."""
        return self.failure is None and not any(map(NO_MEMORY.search, self.rejected.values()))


class BlockTask(NamedTuple):
    """What a variant is chosen for."""

    device_type: str
    dtype: torch.dtype
    """Of products."""
    residual: torch.dtype
    """Of the stream."""
    shape: BlockShape
    attention: str
    """``ModelConfig.attention``; with auto the backend is chosen again, as part of the block."""
    is_compiled: bool = True
    """Whether blocks are compiled, and so measured."""

    @property
    def key(self) -> str:
        """Of its entry on the disk."""
        how = "compiled" if self.is_compiled else "eager"
        return f"{self.dtype}, residual {self.residual}, attention {self.attention}, {how}: {self.shape}"

    def why_not(self, variant: Variant) -> str | None:
        """Why ``variant`` cannot be used, in one line; None if it can, as far as was tried."""
        place = self.device_type, self.dtype
        own = (variant.attention,) if variant.attention in RETURN_BIAS else ()
        reasons = (why_not_fused(name, *place, self.residual, self.shape) for name in (*own, *variant.fused))
        return next(filter(None, reasons), None) or why_not(variant.attention, *place, attention_of(self.shape))


def choose_block(task: BlockTask) -> Found:
    """How such blocks compute from now on: known from the disk, where no times are given, or measured now; torch's own way
    within ``unmeasured``. Raises InputError as ``measure_block`` does."""
    best = known_block(task)
    if best is None and not measures():
        return Found(Variant(task.attention), {}, {})
    found = Found(best, {}, {}) if best else measure_block(task)
    if best is None and found.lasts:
        write_entries(task.device_type, BLOCKS, {task.key: {**found._asdict(), "best": list(found.best)}})
    adopt_block(task, found.best)
    return found


def adopt_block(task: BlockTask, variant: Variant) -> None:
    """Compute such blocks as ``variant`` says, measured here or by rank 0."""
    adopt_fused(task.device_type, task.dtype, task.residual, {task.shape: variant.fused})
    if task.attention == "auto":
        adopt(task.device_type, task.dtype, {attention_of(task.shape): variant.attention})


def known_block(task: BlockTask) -> Variant | None:
    """What was measured before, on disk, if it can be used."""
    entry = read_entries(task.device_type, BLOCKS).get(task.key, {})
    with contextlib.suppress(KeyError, TypeError, ValueError):
        attention, fused = entry["best"]
        if attention in BACKENDS and isinstance(fused, list) and set(fused) <= set(FUSED):
            variant = Variant(attention, tuple(fused))
            if task.attention in ("auto", attention) and task.why_not(variant) is None:
                return variant
    return None


def measure_block(task: BlockTask, tokens: int = _TOKENS) -> Found:
    """The fastest variant, over about ``tokens`` tokens.

    Afterwards random numbers and memory of this process are as before, and what it has compiled is forgotten. Raises InputError
    if a variant has left the GPU unusable for this process; the next start does not try it.
    """
    on_gpu = task.device_type == "cuda"
    probe_blocks(task.device_type, task.dtype, task.residual, [task.shape], _changes(task))
    try:
        # Compilers draw random numbers.
        with torch.random.fork_rng(devices=[torch.cuda.current_device()] if on_gpu else []):
            return _measured(task, max(1, tokens // task.shape.tokens))
    finally:
        if task.is_compiled:
            torch.compiler.reset()  # it keeps the graphs with their memory, and few variants of one function
        if on_gpu:
            with contextlib.suppress(RuntimeError):  # of a GPU that has failed, which is reported
                torch.cuda.empty_cache()  # a step needs it


def _changes(task: BlockTask) -> tuple[str, ...]:
    """What may be tried, of ``trial.TRIED``."""
    fused = (name for name in FUSED if name != "linear" or task.dtype != torch.float32)  # which casts nothing then
    return *fused, *(b for b in RETURN_BIAS if task.attention in ("auto", b))


def _measured(task: BlockTask, images: int) -> Found:
    device_type, dtype, residual, shape, attention, is_compiled = task
    attention = fastest_alone(device_type, dtype, attention_of(shape)) if attention == "auto" else attention
    best, times, rejected = Variant(attention), {}, {}
    with torch.inference_mode(False), torch.enable_grad():
        try:
            trial = Trial(device_type, dtype, residual, shape, images)
            exact = trial.eager(best)
            run = trial.run(best, is_compiled)
            run()
        except Exception as failure:  # as without a compiler, or memory: nothing can be compared
            if not answers(device_type):
                raise
            return Found(best, times, {str(best): _line(failure)})
        for change in _changes(task):
            other = best._replace(attention=change) if change in RETURN_BIAS else best._replace(fused=(*best.fused, change))
            if other == best:  # our own attention, asked for by name
                continue
            try:
                if (reason := task.why_not(other)) is not None:
                    raise RuntimeError(reason)
                candidate = trial.run(other, is_compiled)
                check(candidate(), exact)
                pair = _in_turns([run, candidate], device_type)
            except Exception as failure:  # whatever a compiler or kernel raises is the verdict on the variant
                if not answers(device_type):  # as after an illegal memory access
                    keep_fault(change, device_type, dtype, residual, shape, _line(failure))
                    raise InputError(f"{other} broke the GPU's context while it was measured, {_line(failure)}; start the same "
                                     "command again, which does not try it any more") from failure  # fmt: skip
                rejected[str(other)] = _line(failure)
                continue
            for variant, taken in zip((best, other), pair, strict=True):
                times[str(variant)] = round(1e6 * statistics.median(taken), 1)
            ratio = statistics.median(b / a for a, b in zip(*pair, strict=True))
            if ratio < _LEAST:
                best, run = other, candidate
            else:
                rejected[str(other)] = f"takes {ratio:.3f} of the time of {best}"
    return Found(best, times, rejected)


def _in_turns(runs: list[Callable], device_type: str) -> list[list[float]]:
    """Seconds of a call of each run, in each round."""
    for run in runs:
        seconds(run, device_type, 2)
    rounds = [[seconds(run, device_type, _CALLS) for run in runs] for _ in range(_ROUNDS)]
    return [list(taken) for taken in zip(*rounds, strict=True)]


def _line(failure: Exception) -> str:
    return f"{type(failure).__name__}: {' '.join(str(failure).split())[:300]}"
