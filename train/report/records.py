"""The records of a run's ``metrics.jsonl``: a JSON object per line, an event or the measurements of a log interval.

A kill may truncate a line; the next start then follows on the same line.
"""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from fastmae.errors import DataError, InputError
from fastmae.train.pretrain.log import METRICS, METRICS_SCHEMA
from fastmae.train.units import number

MOST = 1e12  # steps, or seconds since 1970; a greater number is neither
_DEEPEST = 100  # levels of lists and objects in a record; a run's settings have five
_RECORD = re.compile(r'\{"(?:event|step)"')


def read_records(run: Path) -> tuple[list[dict], int]:
    """The records of the run in the folder ``run``, and how many lines or parts of lines are unreadable.

    Each record has a ``step`` (int or None) and a ``time`` (Unix seconds or None); only one with an ``event`` may lack a step.
    Raises InputError if there is no log, DataError if nothing in it can be read or its schema is not this version's.
    """
    path = run / METRICS
    if not run.is_dir():
        raise InputError(f"{run}: no such folder; give the one that `fastmae pretrain` got as --out")
    try:
        with path.open(encoding="utf-8", errors="replace") as lines:
            records = list(_parse_lines(lines))
    except FileNotFoundError:
        raise InputError(f"{path}: missing; this folder holds no run, or one that has not started") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read, {error.strerror}") from error
    if not records:
        raise InputError(f"{path}: empty; the run has not started, or was killed before its first record")
    found = [r for r in records if r is not None]
    if not found:
        raise DataError(f"{path}: none of its {len(records)} lines is a record of a run; it is damaged or another file")
    for record in found:
        if record.get("event") == "start" and (schema := record.get("schema")) != METRICS_SCHEMA:
            raise DataError(f"{path}: schema must be {METRICS_SCHEMA}, got {schema!r}; use the fastmae version that wrote it")
    return found, len(records) - len(found)


def _parse_lines(lines: Iterable[str]) -> Iterator[dict | None]:
    """A record per line, None for each that cannot be read."""
    for line in filter(str.strip, lines):
        record = _parse(line)
        yield record
        if record is None and (starts := [m.start() for m in _RECORD.finditer(line, 1)]):
            tail = _parse(line[starts[-1] :])
            if tail is not None:
                yield tail


def _parse(text: str) -> dict | None:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or not isinstance(found.get("event", ""), str) or _depth(found) > _DEEPEST:
        return None
    step, when = number(found.get("step")), number(found.get("time"))
    found["step"] = step = int(step) if step is not None and 0 <= step < MOST else None
    found["time"] = when if when is not None and 0 <= when < MOST else None
    return found if "event" in found or step is not None else None


def _depth(value: object) -> int:
    """Levels of lists and objects; counted without recursion, which would end at a thousand."""
    level, depth = [value], 0
    while level := [c for c in level if isinstance(c, dict | list)]:
        level, depth = [v for c in level for v in (c.values() if isinstance(c, dict) else c)], depth + 1
    return depth
