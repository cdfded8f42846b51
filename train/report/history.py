"""The history of a run, from its ``metrics.jsonl``: attempts, the measurements that are still valid, and events.

A restarted run appends to its log. A start at step s invalidates what was logged of later steps before: that work is done
again. Times are Unix seconds; what a log lacks, or holds as something else than a finite number, is None.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from fastmae.train.report.records import MOST, read_records
from fastmae.train.units import number

_SILENCE = 900.0  # seconds; quiet for so long, and for five times its longest interval, a run is considered dead
_OF_STEPS = ("replaced", "skipped", "spike", "reconstruction", "checkpoint")  # invalid with their steps; others stay valid


class Measurement(NamedTuple):
    """The means of a log interval that ended with ``step`` steps done."""

    step: int
    time: float | None
    running: float | None
    """Seconds that the run had been running, without the pauses between attempts."""
    values: dict[str, float | None]


class Change(NamedTuple):
    """A setting that an attempt changed; a missing one is None."""

    attempt: int
    name: str
    before: object
    after: object


@dataclass(kw_only=True)
class Attempt:
    """A run from one start to the next."""

    number: int
    """From 1."""
    first_step: int
    """Steps done when it began."""
    last_step: int
    """Steps done by its last record."""
    began: float | None
    ended: float | None
    """Time of its last record."""
    total_steps: int | None = None
    resumed_from: str | None = None
    settings: dict[str, dict[str, object]] = field(default_factory=dict)
    """Model, recipe, run and environment, nested settings under dotted names."""
    ending: str = ""
    """finished, stopped, diverged, or empty if no record has it."""
    reason: str = ""
    lost_steps: int = 0
    """Steps of the attempt before that this one does again."""
    lost_records: int = 0
    """Measurements that its start invalidated."""
    lost_seconds: float | None = None
    """Time that the lost steps had taken."""
    pause: float | None = None
    """Seconds from the last record of the attempt before to this one's start."""
    longest_gap: float = 0.0
    """Seconds between two of its records."""

    @property
    def seconds(self) -> float:
        """From start to last record; 0 if a clock went back or there is none."""
        return max(0.0, self.ended - self.began) if self.began is not None and self.ended is not None else 0.0


@dataclass(frozen=True, kw_only=True)
class History:
    """A run as its log has it."""

    attempts: list[Attempt]
    measurements: list[Measurement]
    """The valid ones, by step."""
    events: dict[str, list[dict]]
    """By name, in the log's order: ``replaced``, ``skipped``, ``spike``, ``reconstruction`` and ``checkpoint`` as far as
    their steps are valid, others all. ``step`` is an int or None."""
    unreadable: int
    """Lines, or parts of lines, that are not a record."""

    @property
    def last(self) -> Attempt:
        """The newest attempt."""
        return self.attempts[-1]

    @property
    def total_steps(self) -> int | None:
        """Steps of the run, from the newest attempt that has them."""
        return next((a.total_steps for a in reversed(self.attempts) if a.total_steps is not None), None)

    def state(self, now: float) -> str:
        """The last attempt's ending; without one ``running``, or ``silent`` if nothing was logged for long."""
        last = self.last
        limit = max(_SILENCE, 5 * last.longest_gap)
        return last.ending or ("silent" if last.ended is None or now - last.ended > limit else "running")

    def changes(self) -> list[Change]:
        """What differs between each attempt's settings and those of the one before, of parts that both logged."""
        found = []
        for before, after in pairwise(self.attempts):
            for part in before.settings.keys() & after.settings.keys():
                old, new = before.settings[part], after.settings[part]
                names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
                found += [Change(after.number, f"{part}: {n}", old.get(n), new.get(n)) for n in names]
        return sorted(found, key=lambda change: change[:2])


def read_history(run: Path) -> History:
    """Read the log of the folder ``run``. Raises InputError and DataError as ``read_records`` does."""
    records, unreadable = read_records(run)
    attempts, measurements, events = _replay(records)
    by_name: dict[str, list[dict]] = {}
    for event in events:
        by_name.setdefault(event["event"], []).append(event)
    return History(attempts=attempts, measurements=measurements, events=by_name, unreadable=unreadable)


def _replay(records: list[dict]) -> tuple[list[Attempt], list[Measurement], list[dict]]:
    """Attempts, and the valid measurements and events, of a log's records in their order."""
    attempts: list[Attempt] = []
    measurements: list[Measurement] = []
    events: list[dict] = []
    earlier = 0.0  # seconds that earlier attempts ran
    for record in records:
        name = record.get("event")
        if name == "start" or not attempts:
            first = record["step"] or 0 if name == "start" else 0
            attempt = _attempt(record if name == "start" else {}, len(attempts) + 1, first, record["time"])
            if attempts:
                kept = [m for m in measurements if m.step <= first]
                standing = [e for e in events if e["event"] not in _OF_STEPS or (e["step"] or 0) <= first]
                _count_lost(attempt, attempts, kept, standing, len(measurements) - len(kept))
                measurements, events = kept, standing
            earlier = sum(a.seconds for a in attempts)
            attempts.append(attempt)
        attempt = attempts[-1]
        _follow(attempt, record)
        if name is None:
            since = None if record["time"] is None or attempt.began is None else max(0.0, record["time"] - attempt.began)
            running = None if since is None else earlier + since
            values = {k: number(v) for k, v in record.items() if k not in ("step", "time")}
            measurements.append(Measurement(record["step"], record["time"], running, values))
        elif name != "start":
            events.append(record)
    return attempts, sorted(measurements, key=lambda m: m.step), events


def _attempt(start: dict, count: int, first_step: int, began: float | None) -> Attempt:
    recipe = dict(start["recipe"]) if isinstance(start.get("recipe"), dict) else {}
    model = recipe.pop("model", None)
    environment = start.get("environment")
    environment = dict(environment) if isinstance(environment, dict) else {}
    environment |= {name: start[key] for name, key in (("processes", "world"), ("parallel", "parallel")) if key in start}
    parts = {"model": model, "recipe": recipe, "run": start.get("run"), "environment": environment}
    settings = {name: flat for name, part in parts.items() if isinstance(part, dict) and (flat := dict(_flatten(part)))}
    total = number(start.get("total_steps"))
    source = start.get("resumed_from")
    return Attempt(number=count, first_step=first_step, last_step=first_step, began=began, ended=began,
                   total_steps=int(total) if total is not None and 1 <= total < MOST else None, settings=settings,
                   resumed_from=source if isinstance(source, str) else None)  # fmt: skip


def _flatten(tree: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _follow(attempt: Attempt, record: dict) -> None:
    """Bring ``attempt`` up to its next record."""
    if record["time"] is not None:
        if attempt.ended is not None:
            attempt.longest_gap = max(attempt.longest_gap, record["time"] - attempt.ended)
        attempt.began = record["time"] if attempt.began is None else attempt.began
        attempt.ended = record["time"] if attempt.ended is None else max(attempt.ended, record["time"])
    attempt.last_step = max(attempt.last_step, record["step"] or 0)
    name = record.get("event")
    if name in ("stopped", "diverged") and attempt.ending != "diverged":
        attempt.ending, attempt.reason = name, str(record.get("reason") or "")
    elif name == "end" and not attempt.ending:
        attempt.ending = "finished" if attempt.last_step >= (attempt.total_steps or math.inf) else "stopped"


def _count_lost(attempt: Attempt, earlier: list[Attempt], kept: list[Measurement], events: list[dict], void: int) -> None:
    """Count what ``attempt``, just started, does again."""
    before, first = earlier[-1], attempt.first_step
    attempt.lost_steps, attempt.lost_records = max(0, before.last_step - first), void
    if before.ended is not None and attempt.began is not None:
        attempt.pause = max(0.0, attempt.began - before.ended)
    # A save is logged when it is done; training continued meanwhile.
    times = [(e["step"], e["time"] and e["time"] - (number(e.get("seconds")) or 0.0)) for e in events]
    times += [(m.step, m.time) for m in kept] + [(a.first_step, a.began) for a in earlier]
    reached = max((t for step, t in times if t is not None and step is not None and step <= first), default=None)
    if attempt.lost_steps and reached is not None and before.ended is not None:
        attempt.lost_seconds = max(0.0, before.ended - reached)
