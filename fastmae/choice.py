"""The fastest attention backend for a shape, found by a short measurement on this device.

Each backend that works is timed forward and backward on queries, keys and values of one packed tensor, as a block makes them;
the fastest is kept in this process and in a file, one per device and set of versions, so that it is measured once. The file is
``attention-*.json`` in ``FASTMAE_CACHE`` (default ``~/.cache/fastmae``); deleting it makes the next run measure anew.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fastmae.backends import attend, prepare, why_not
from fastmae.config import BACKENDS
from fastmae.errors import InputError
from fastmae.files import write_atomically

_TOKENS = 131_072  # keys in a measured batch: enough work that launches do not hide differences
_ROUNDS, _CALLS = 5, 8  # interleaved rounds of so many calls each
_TOLERANCE = 2e-2  # relative, against SDPA's math: several times what bf16 rounding gives, far below any mistake


class Shape(NamedTuple):
    """What decides how fast attention is, besides device and dtype."""

    queries: int
    keys: int
    heads: int
    head_dim: int

    def __str__(self) -> str:
        return f"{self.queries} over {self.keys} tokens, {self.heads} heads of {self.head_dim}"


_chosen: dict[tuple[str, torch.dtype, Shape], str] = {}


def fastest(device_type: str, dtype: torch.dtype, shape: Shape) -> str:
    """The backend to use: from this process, from the file, or measured now."""
    place = (device_type, dtype, shape)
    if place not in _chosen:
        known = _read(device_type).get(_key(dtype, shape), {}).get("backend")
        _chosen[place] = known if known in BACKENDS and _works(known, *place) else _measure_once(*place)
    return _chosen[place]


def adopt(device_type: str, dtype: torch.dtype, choices: dict[Shape, str]) -> None:
    """Take over what another process chose, so that all processes of a run compute alike."""
    _chosen.update({(device_type, dtype, shape): backend for shape, backend in choices.items()})


def measure(device_type: str, dtype: torch.dtype, shape: Shape, tokens: int = _TOKENS) -> dict[str, float]:
    """Microseconds of a forward and backward pass over about ``tokens`` keys, for each backend that works; fastest first."""
    B = max(1, tokens // shape.keys)
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device_type, enabled=False):
        runs = {}
        for backend in [b for b in BACKENDS if _works(b, device_type, dtype, shape)]:
            with contextlib.suppress(Exception):  # what works on the probe's few tokens may still refuse these
                run = _forward_backward(backend, device_type, dtype, shape, B)
                _seconds(run, device_type, 2)
                runs[backend] = run
        exact = _sample("math", device_type, dtype, shape)
        for backend in [b for b in runs if not _agree(_sample(b, device_type, dtype, shape), exact)]:
            del runs[backend]  # fast and wrong
        times = {backend: [] for backend in runs}
        for _ in range(_ROUNDS):
            for backend, run in runs.items():
                times[backend].append(_seconds(run, device_type, _CALLS))
    medians = {backend: 1e6 * statistics.median(t) for backend, t in times.items()}
    return dict(sorted(medians.items(), key=lambda item: item[1]))


def cache_file(device_type: str) -> Path:
    """Where choices for this device and these versions are kept."""
    folder = Path(os.environ.get("FASTMAE_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "fastmae")
    name = hashlib.sha256(json.dumps(_identity(device_type)).encode()).hexdigest()[:16]
    return folder.expanduser() / f"attention-{name}.json"


def _works(backend: str, device_type: str, dtype: torch.dtype, shape: Shape) -> bool:
    return why_not(backend, device_type, dtype, shape.head_dim) is None


def _forward_backward(backend: str, device_type: str, dtype: torch.dtype, shape: Shape, B: int) -> Callable[[], list[Tensor]]:
    """A pass over ``B`` images: the result and the gradients."""
    N, M, H, d = shape
    generator = torch.Generator(device_type).manual_seed(0)  # its own: who draws later must not see that this was measured
    draw = partial(torch.randn, device=device_type, dtype=dtype, generator=generator)
    q, packed = draw(B, N, 1, H, d).requires_grad_(), draw(B, M, 3 if N == M else 2, H, d).requires_grad_()
    weight = draw(B, N, H, d)
    prepare(backend)

    def run() -> list[Tensor]:
        queries, k, v = packed.unbind(2) if N == M else (q[:, :, 0], *packed.unbind(2))
        out = attend(queries, k, v, backend)
        return [out.detach(), *torch.autograd.grad(out, [packed] if N == M else [packed, q], weight)]

    return run


def _sample(backend: str, device_type: str, dtype: torch.dtype, shape: Shape) -> list[Tensor]:
    return _forward_backward(backend, device_type, dtype, shape, 2)()


def _agree(found: list[Tensor], exact: list[Tensor]) -> bool:
    return all((f.float() - e.float()).norm() <= _TOLERANCE * e.float().norm() for f, e in zip(found, exact, strict=True))


def _seconds(run, device_type: str, calls: int) -> float:
    """Mean seconds of one of ``calls`` calls."""
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
    backend = next(iter(times), "sdpa")
    _write(device_type, _key(dtype, shape), backend, times)
    return backend


def _identity(device_type: str) -> dict[str, str]:
    """What a measurement is valid for."""
    versions = {"torch": torch.__version__, "cuda": str(torch.version.cuda)}
    for package in ("xformers", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    device = torch.cuda.get_device_name() if device_type == "cuda" else device_type
    return {"device": device, **versions}


def _key(dtype: torch.dtype, shape: Shape) -> str:
    return f"{dtype}: {shape}"


def _read(device_type: str) -> dict[str, dict]:
    """The choices that the file holds: none if it is not there or damaged."""
    try:
        choices = json.loads(cache_file(device_type).read_text())["choices"]
        return {key: dict(choice) for key, choice in choices.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _write(device_type: str, key: str, backend: str, times: dict[str, float]) -> None:
    path, choices = cache_file(device_type), _read(device_type)
    choices[key] = {"backend": backend, "microseconds": {b: round(t, 1) for b, t in times.items()}}
    with contextlib.suppress(OSError, InputError):  # a machine that keeps nothing measures in every process
        path.parent.mkdir(parents=True, exist_ok=True)
        with write_atomically(path) as file:
            file.write(json.dumps({**_identity(device_type), "choices": choices}, indent=1).encode())
