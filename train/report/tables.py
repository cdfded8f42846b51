"""The sections of a run's page that are tables: restarts, errors, checkpoints, configuration."""

import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from fastmae.train.report.history import History
from fastmae.train.units import format_bytes, format_count, format_duration, format_time, format_value, number

_NUMBER = re.compile(r"[-+]?[\d.,]+(e[-+]?\d+)?|")


@dataclass(frozen=True)
class Table:
    """Rows of text, of which the first or the newest ``cap`` are shown."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    newest: bool = False
    cap: int = 20

    @property
    def shown(self) -> Sequence[Sequence[str]]:
        """The rows on the page."""
        return self.rows[-self.cap :] if self.newest else self.rows[: self.cap]

    @property
    def classes(self) -> list[str]:
        """Of each column: ``n`` for numbers, which are aligned right, ``short`` for text that needs no line break."""
        columns = list(zip(*self.shown, strict=True))
        return ["n" if all(map(_NUMBER.fullmatch, column)) and self.head[-1] != "value"
                else "short" if max(map(len, column)) <= 20 else "" for column in columns]  # fmt: skip


@dataclass(frozen=True)
class Section:
    """A heading, a sentence and tables; those without rows are not on the page."""

    name: str
    text: str
    tables: Sequence[Table] = ()


def restarts(history: History) -> Section:
    """When the run was started again, from which step, and what was lost."""
    rows = []
    for before, attempt in zip([None, *history.attempts], history.attempts, strict=False):
        how = attempt.ending and attempt.ending + (f": {attempt.reason}" if attempt.reason else "")
        how = how or ("killed, or crashed" if attempt is not history.last else "")
        lost = "" if before is None else f"{attempt.lost_steps:,}"
        rows.append([str(attempt.number), format_time(attempt.began), f"{attempt.first_step:,}", attempt.resumed_from or "",
                     f"{attempt.last_step:,}", how, format_duration(attempt.seconds), lost,
                     format_duration(attempt.lost_seconds), format_duration(attempt.pause)])  # fmt: skip
    if len(rows) == 1:
        return Section("restarts", "None: the run has been started once.")
    steps, records = (sum(getattr(a, name) for a in history.attempts) for name in ("lost_steps", "lost_records"))
    again, pauses = (sum(getattr(a, name) or 0.0 for a in history.attempts) for name in ("lost_seconds", "pause"))
    text = (f"{format_count(len(rows) - 1, 'restart')}; at least {format_count(steps, 'step')} repeated "
            f"({format_duration(again)}), {format_count(records, 'measurement')} discarded, "
            f"{format_duration(pauses)} between attempts.")  # fmt: skip
    head = ["attempt", "started", "from step", "checkpoint", "to step", "ended", "ran for", "repeated steps", "their time",
            "pause before"]  # fmt: skip
    return Section("restarts", text, [Table("Attempts", head, rows, newest=True)])


def errors(history: History) -> Section:
    """Replaced samples, skipped updates, loss spikes, dead workers, lost consoles."""
    names = ("replaced", "skipped", "spike", "worker_died", "console_lost")
    replaced, skipped, spikes, deaths, lost = (history.events.get(name, []) for name in names)
    samples: dict[str, list[dict]] = {}
    for event in replaced:
        samples.setdefault(format_value(event.get("sample")), []).append(event)
    often = sorted(samples.items(), key=lambda item: -len(item[1]))
    tables = [
        Table("Replaced samples", ["sample and reason", "times", "first seen by step"],
              [[name, str(len(found)), _step(found[0])] for name, found in often]),
        Table("Skipped updates, gradients not finite", ["by step", "updates"], _rows(skipped, "updates"), newest=True),
        Table("Loss spikes", ["step", "loss", "z-score", "update skipped"], _rows(spikes, "loss", "z", "skipped"), newest=True),
        Table("Dead workers", ["by step", "worker"], _rows(deaths, "worker"), newest=True),
        Table("Lost consoles", ["at", "stream", "reason"],
              [[format_time(e["time"]), *row[1:]] for e, row in zip(lost, _rows(lost, "stream", "reason"), strict=True)]),
    ]  # fmt: skip
    updates = sum(int(number(e.get("updates")) or 0) for e in skipped)
    counts = {"replaced sample": len(samples), "skipped update": updates, "loss spike": len(spikes),
              "dead worker": len(deaths), "lost console": len(lost)}  # fmt: skip
    return Section("errors", (", ".join(format_count(n, noun) for noun, n in counts.items() if n) or "None") + ".", tables)


def checkpoints(history: History) -> Section:
    """What was saved, and what could not be."""
    saved, failed = history.events.get("checkpoint", []), history.events.get("checkpoint_failed", [])
    rows = [[_step(e), format_time(e["time"]), format_duration(number(e.get("seconds"))), format_bytes(e.get("bytes"))]
            for e in saved]  # fmt: skip
    failures = [[_step(e), format_time(e["time"]), format_value(e.get("error"))] for e in failed]
    took = [seconds for e in saved if (seconds := number(e.get("seconds"))) is not None]
    mean = f", in {format_duration(statistics.fmean(took))} on average" if took else ""
    text = f"{len(saved):,} saved{mean}; {len(failed):,} failed. The run keeps the newest and removes older ones."
    return Section("checkpoints", text, [Table("Saved", ["step", "at", "took", "size"], rows, newest=True, cap=10),
                                         Table("Failed", ["step", "at", "error"], failures, newest=True)])  # fmt: skip


def configuration(history: History) -> Section:
    """Model, recipe, run and environment, and what changed between starts."""
    newest = {name: part for attempt in history.attempts for name, part in attempt.settings.items()}
    tables = [Table(name.capitalize(), ["setting", "value"], [[k, format_value(v)] for k, v in newest[name].items()], cap=100)
              for name in ("model", "recipe", "run", "environment") if name in newest]  # fmt: skip
    changes = [[str(c.attempt), c.name, format_value(c.before), format_value(c.after)] for c in history.changes()]
    text = "" if tables else "The log holds no settings."
    if tables and not changes and len(history.attempts) > 1:
        text = "Nothing was changed between attempts."
    head = ["attempt", "setting", "before", "after"]
    return Section("configuration", text, [Table("Changed between attempts", head, changes, newest=True), *tables])


def _rows(events: Sequence[dict], *names: str) -> list[list[str]]:
    return [[_step(event), *(format_value(event.get(name)) for name in names)] for event in events]


def _step(event: dict) -> str:
    return "" if event["step"] is None else f"{event['step']:,}"
