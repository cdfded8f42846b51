"""Which fused operations work here, on a run's own shapes: tried in a child process before they are measured.

After an illegal memory access a process cannot use its GPU any more, so they are not tried in the one that trains
(``fastmae.model.attention.probe_process``). Results are kept on disk (``fastmae.model.attention.cache``). On other devices
than GPUs nothing is tried: there they are plain torch.
"""

import json
import sys
from collections.abc import Iterable

import torch

from fastmae.model.attention.cache import PROBES, read_entries, write_entries
from fastmae.model.attention.probe_process import ProbeError, main, probe_in_child
from fastmae.model.attention.trial import answers, open_device
from fastmae.model.block.choice import BlockShape
from fastmae.model.block.trial import TRIED, try_out

_found: dict[tuple[str, torch.dtype, torch.dtype, str, BlockShape], str | None] = {}


def why_not_fused(name: str, device_type: str, dtype: torch.dtype, residual: torch.dtype, shape: BlockShape) -> str | None:
    """The reason in one line why ``name``, of ``trial.TRIED``, must not be used in a block of ``shape``; None if
    ``probe_blocks`` has found none."""
    return _found.get((device_type, dtype, residual, name, shape))


def probe_blocks(device_type: str, dtype: torch.dtype, residual: torch.dtype, shapes: Iterable[BlockShape],
                 names: tuple[str, ...] = TRIED, index: int | None = None) -> None:  # fmt: skip
    """Try ``names`` in blocks of ``shapes``, unless they were, on a GPU.

    ``index``: the GPU's number, by default this process's own, which is not initialised for it. If another process cannot open
    it, nothing is tried.
    """
    if device_type != "cuda":
        return
    place, kept = (device_type, dtype, residual), read_entries(device_type, PROBES)
    for name, shape in [(name, shape) for shape in shapes for name in names if (*place, name, shape) not in _found]:
        reason = kept.get(_key(dtype, residual, shape), {}).get(name, 0)
        if reason is None or isinstance(reason, str):
            _found[*place, name, shape] = reason
    rest = [(name, shape) for shape in shapes for name in names if (*place, name, shape) not in _found]
    if not rest:
        return
    if index is None:
        index = torch.cuda.current_device() if torch.cuda.is_initialized() else 0
    pairs = [(name, (*shape, str(residual).removeprefix("torch."))) for name, shape in rest]
    try:
        verdicts = probe_in_child(device_type, index, dtype, pairs, __name__)
    except ProbeError as error:  # then the measurement finds out
        verdicts = error.found
    # If nothing works, the machine is at fault, and other machines may share the cache.
    is_sound = any(verdict.reason is None for verdict in verdicts.values())
    for (name, shape), pair in zip(rest, pairs, strict=True):
        if (verdict := verdicts.get(pair)) is not None:
            _found[*place, name, shape] = verdict.reason
            if verdict.lasts and is_sound:
                kept.setdefault(_key(dtype, residual, shape), {})[name] = verdict.reason
    if is_sound:
        write_entries(device_type, PROBES, kept)


def keep_fault(name: str, device_type: str, dtype: torch.dtype, residual: torch.dtype, shape: BlockShape, reason: str) -> None:
    """Keep ``reason`` why ``name`` must not be used, which its trial has not shown, on disk for processes to come."""
    key = _key(dtype, residual, shape)
    known = read_entries(device_type, PROBES).get(key, {})
    write_entries(device_type, PROBES, {key: known | {name: reason}})


def _key(dtype: torch.dtype, residual: torch.dtype, shape: BlockShape) -> str:
    return f"{dtype}, residual {residual}: {shape}"


def _try_out(name: str, device_type: str, dtype: str, pair: list):
    *sizes, residual = pair
    return try_out(name, device_type, getattr(torch, dtype), getattr(torch, residual), BlockShape(*sizes))


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1]), open_device, _try_out, answers))
