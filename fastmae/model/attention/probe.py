"""Which attention backends work here, on a run's own shapes: probed before one is measured or trained with.

On a GPU they are tried in child processes, since a process cannot use its GPU after an illegal memory access
(``fastmae.model.attention.probe_process``); on the CPU in this one. Results are cached on disk (``cache.py``).
"""

import torch

from fastmae.model.attention.backends import Shape, refusal
from fastmae.model.attention.cache import PROBES, entry_key, read_entries, write_entries
from fastmae.model.attention.probe_process import Pair, ProbeError, probe_in_child
from fastmae.model.attention.trial import Verdict, try_out
from fastmae.model.config import BACKENDS

_found: dict[tuple[str, torch.dtype, Pair], str | None] = {}
_in_process: set[str] = set()


def why_not(backend: str, device_type: str, dtype: torch.dtype, shape: Shape) -> str | None:
    """None if ``backend`` works forward and backward on ``shape`` and agrees with math, else the reason in one line."""
    pair = backend, shape
    if (reason := refusal(backend, device_type, shape)) is not None:
        return reason
    if (device_type, dtype, pair) not in _found:
        probe(device_type, dtype, [shape], BACKENDS if device_type == "cuda" else (backend,))
    return _found[device_type, dtype, pair]


def probe(device_type: str, dtype: torch.dtype, shapes: list[Shape], backends: tuple[str, ...] = BACKENDS,
          index: int | None = None) -> None:  # fmt: skip
    """Try ``backends`` on all ``shapes``, unless they were: on a GPU in one child process, or several if some crash.

    ``index``: the GPU's number, by default this process's own, which is not initialised for it.
    """
    pairs = [(b, s) for s in shapes for b in backends if refusal(b, device_type, s) is None]
    pairs = [pair for pair in pairs if (device_type, dtype, pair) not in _found]
    if device_type != "cuda":
        _keep(device_type, dtype, {(b, s): try_out(b, device_type, dtype, s) for b, s in pairs})
        return
    known = read_entries(device_type, PROBES) if pairs else {}
    for backend, shape in pairs:
        reason = known.get(entry_key(dtype, shape), {}).get(backend, 0)
        if reason is None or isinstance(reason, str):
            _keep(device_type, dtype, {(backend, shape): Verdict(reason)})
    if rest := [pair for pair in pairs if (device_type, dtype, pair) not in _found]:
        verdicts = _probe_in_child(dtype, rest, index)
        _keep(device_type, dtype, verdicts)
        # If nothing works, the machine is at fault, and other machines may share the cache.
        is_sound = any(verdict.reason is None for verdict in verdicts.values())
        for (backend, shape), (reason, lasts) in verdicts.items():
            if lasts and is_sound:
                known.setdefault(entry_key(dtype, shape), {})[backend] = reason
        write_entries(device_type, PROBES, known)


def notes() -> list[str]:
    """A log line if backends had to be tried in this process, as on a GPU in exclusive mode."""
    return [f"attention backends were probed in this process: {reason}" for reason in sorted(_in_process)]


def _probe_in_child(dtype: torch.dtype, pairs: list[Pair], index: int | None) -> dict[Pair, Verdict]:
    if index is None:
        index = torch.cuda.current_device() if torch.cuda.is_initialized() else 0
    try:
        return probe_in_child("cuda", index, dtype, pairs)
    except ProbeError as error:
        _in_process.add(str(error))
        here = [pair for pair in pairs if pair not in error.found]
        return error.found | {(b, s): try_out(b, "cuda", dtype, s)._replace(lasts=False) for b, s in here}


def _keep(device_type: str, dtype: torch.dtype, verdicts: dict[Pair, Verdict]) -> None:
    _found.update({(device_type, dtype, pair): verdict.reason for pair, verdict in verdicts.items()})
