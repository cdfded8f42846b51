"""The fastest attention backend for a shape, found by a short measurement on this device.

Each backend that works (``probe.py``) is timed forward and backward; the fastest is cached in this process and on disk
(``cache.py``).
"""

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch

from fastmae.model.attention.backends import RETURN_BIAS, Shape, prepare
from fastmae.model.attention.cache import CHOICES, entry_key, read_entries, write_entries
from fastmae.model.attention.probe import probe, why_not
from fastmae.model.attention.trial import Inputs, forward_backward
from fastmae.model.config import BACKENDS

_TOKENS = 131_072  # keys of a timed batch: enough work to hide launch overhead
_ROUNDS, _CALLS = 5, 8  # interleaved rounds, and calls in each
_UNMEASURED = "sdpa"

_chosen: dict[tuple[str, torch.dtype, Shape], str] = {}
_measures = True


def fastest(device_type: str, dtype: torch.dtype, shape: Shape) -> str:
    """The backend to use: adopted, or the fastest alone, which is measured once."""
    key = (device_type, dtype, shape)
    if key not in _chosen and not _measures:
        return _UNMEASURED
    if key not in _chosen:
        _chosen[key] = fastest_alone(*key)
    return _chosen[key]


def fastest_alone(device_type: str, dtype: torch.dtype, shape: Shape) -> str:
    """The fastest backend, known from the disk or measured now, but for our own: that is chosen as part of a block
    (``fastmae.model.block.measured``)."""
    known = read_entries(device_type, CHOICES).get(entry_key(dtype, shape), {}).get("backend")
    is_usable = known in BACKENDS and why_not(known, device_type, dtype, shape) is None
    return known if is_usable else _measure_once(device_type, dtype, shape)


def adopt(device_type: str, dtype: torch.dtype, choices: dict[Shape, str]) -> None:
    """Use what another process chose, so that all ranks of a run compute identically."""
    _chosen.update({(device_type, dtype, shape): backend for shape, backend in choices.items()})


def measures() -> bool:
    """Whether what is not known may be measured: not within ``unmeasured``."""
    return _measures


@contextlib.contextmanager
def unmeasured() -> Iterator[None]:
    """A context in which nothing is measured: torch chooses for shapes whose backend has not been chosen yet."""
    global _measures
    before, _measures = _measures, False
    try:
        yield
    finally:
        _measures = before


def measure(device_type: str, dtype: torch.dtype, shape: Shape, tokens: int = _TOKENS) -> dict[str, float]:
    """Microseconds of a forward and backward pass over about ``tokens`` keys, for each backend that works; fastest first."""
    probe(device_type, dtype, [shape])
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device_type, enabled=False):
        inputs, runs = Inputs.draw(device_type, dtype, shape, max(1, tokens // shape.keys)), {}
        for backend in [b for b in BACKENDS if why_not(b, device_type, dtype, shape) is None]:
            with contextlib.suppress(
                Exception
            ):  # what works on the probe's small batch may run out of memory here, math above all
                prepare(backend)
                run = partial(forward_backward, backend, inputs)
                seconds(run, device_type, 2)
                runs[backend] = run
        times = {backend: [] for backend in runs}
        for _ in range(_ROUNDS):
            for backend, run in runs.items():
                times[backend].append(seconds(run, device_type, _CALLS))
    medians = {backend: 1e6 * statistics.median(t) for backend, t in times.items()}
    return dict(sorted(medians.items(), key=lambda item: item[1]))


def seconds(run: Callable[[], object], device_type: str, calls: int) -> float:
    """Mean seconds of one of ``calls`` calls of ``run``, the device's work included."""
    if device_type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(calls):
        run()
    if device_type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / calls


def _measure_once(device_type: str, dtype: torch.dtype, shape: Shape) -> str:
    times = measure(device_type, dtype, shape)
    if device_type == "cuda":
        torch.cuda.empty_cache()  # math attention alone takes gigabytes, which a step needs
    backend = next((b for b in times if b not in RETURN_BIAS), _UNMEASURED)
    entry = {"backend": backend, "microseconds": {b: round(t, 1) for b, t in times.items()}}
    write_entries(device_type, CHOICES, {entry_key(dtype, shape): entry})
    return backend
