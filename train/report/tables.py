"""The sections of a run's page that are tables: restarts, faults, checkpoints, configuration."""

import statistics

from fastmae.train.report.history import History
from fastmae.train.report.html import make_section, make_table
from fastmae.train.units import format_bytes, format_count, format_duration, format_time, format_value, number


def restarts(history: History) -> str:
    """When it began again, from where, and what was lost."""
    rows = []
    for before, attempt in zip([None, *history.attempts], history.attempts, strict=False):
        lost = "" if before is None else f"{attempt.lost_steps:,}"
        how = attempt.ending and attempt.ending + (f": {attempt.reason}" if attempt.reason else "")
        how = how or ("no word: killed" if attempt is not history.last else "")
        rows.append([str(attempt.number), format_time(attempt.began), f"{attempt.first_step:,}", attempt.resumed_from or "",
                     f"{attempt.last_step:,}", how, format_duration(attempt.seconds), lost,
                     format_duration(attempt.lost_seconds), format_duration(attempt.pause)])  # fmt: skip
    if len(rows) == 1:
        return make_section("restarts", "Restarts", "<p>None: the run has been started once.</p>")
    steps, records = (sum(getattr(a, name) for a in history.attempts) for name in ("lost_steps", "lost_records"))
    again, pauses = (sum(getattr(a, name) or 0.0 for a in history.attempts) for name in ("lost_seconds", "pause"))
    said = (f"{format_count(len(rows) - 1, 'restart')}; {format_count(steps, 'step')} or more done again "
            f"({format_duration(again)}), {format_count(records, 'measurement')} void, "
            f"{format_duration(pauses)} between attempts.")  # fmt: skip
    head = ["attempt", "started", "from step", "checkpoint", "to step", "ended", "ran for", "steps done again", "their time",
            "pause before"]  # fmt: skip
    return make_section("restarts", "Restarts", f"<p>{said}</p>", make_table("Attempts", head, rows, newest=True))


def faults(history: History) -> str:
    """Samples replaced, updates left out, loss spikes, dead workers, consoles lost."""
    names = ("replaced", "left_out", "spike", "worker_died", "console_lost")
    events = {name: history.events.get(name, []) for name in names}
    samples: dict[object, list[dict]] = {}
    for event in events["replaced"]:
        samples.setdefault(format_value(event.get("sample")), []).append(event)
    often = sorted(samples.items(), key=lambda item: -len(item[1]))
    tables = [
        make_table("Replaced samples", ["sample and reason", "times", "first seen by step"],
               [[name, str(len(found)), _step(found[0])] for name, found in often]),
        make_table("Updates left out, gradients not finite", ["by step", "updates"],
               [[_step(e), format_value(e.get("updates"))] for e in events["left_out"]], newest=True),
        make_table("Loss spikes", ["step", "loss", "z-score", "update skipped"],
               [[_step(e), *(format_value(e.get(name)) for name in ("loss", "z", "skipped"))] for e in events["spike"]],
               newest=True),
        make_table("Dead workers", ["by step", "worker"],
               [[_step(e), format_value(e.get("worker"))] for e in events["worker_died"]], newest=True),
        make_table("Consoles lost", ["at", "stream", "reason"],
               [[format_time(e["time"]), *(format_value(e.get(name)) for name in ("stream", "reason"))]
                for e in events["console_lost"]]),
    ]  # fmt: skip
    updates = sum(int(number(e.get("updates")) or 0) for e in events["left_out"])
    counts = {"replaced sample": len(samples), "left-out update": updates, "loss spike": len(events["spike"]),
              "dead worker": len(events["worker_died"]), "lost console": len(events["console_lost"])}  # fmt: skip
    said = ", ".join(format_count(number, noun) for noun, number in counts.items() if number) or "None"
    return make_section("faults", "Faults", f"<p>{said}.</p>", tables[0], f'<div class="columns">{"".join(tables[1:])}</div>')


def checkpoints(history: History) -> str:
    """What was saved, and what could not be."""
    saved, failed = history.events.get("checkpoint", []), history.events.get("checkpoint_failed", [])
    rows = [
        [_step(e), format_time(e["time"]), format_duration(number(e.get("seconds"))), format_bytes(e.get("bytes"))]
        for e in saved
    ]
    failures = [[_step(e), format_time(e["time"]), format_value(e.get("error"))] for e in failed]
    tables = [
        make_table("Saved", ["step", "at", "took", "size"], rows, newest=True, cap=10),
        make_table("Failed", ["step", "at", "error"], failures, newest=True),
    ]
    took = [seconds for e in saved if (seconds := number(e.get("seconds"))) is not None]
    mean = f", in {format_duration(statistics.fmean(took))} on average" if took else ""
    said = f"{len(saved):,} saved{mean}; {len(failed):,} failed. The run keeps the newest and removes older ones."
    return make_section("checkpoints", "Checkpoints", f"<p>{said}</p>", *tables)


def configuration(history: History) -> str:
    """Model, recipe, run and environment, and what changed between starts."""
    newest = {name: part for attempt in history.attempts for name, part in attempt.settings.items()}
    tables = [
        make_table(name.capitalize(), ["setting", "value"], [[key, format_value(v)] for key, v in newest[name].items()],
               cap=100, numbers=False)
        for name in ("model", "recipe", "run", "environment") if newest.get(name)
    ]  # fmt: skip
    changes = [[str(c.attempt), c.name, format_value(c.before), format_value(c.after)] for c in history.changes()]
    changed = make_table("Changed between attempts", ["attempt", "setting", "before", "after"], changes, newest=True)
    if not tables:
        tables = ["<p>The log holds no settings.</p>"]
    changed = changed or ("<p>Nothing was changed between attempts.</p>" if len(history.attempts) > 1 else "")
    return make_section("configuration", "Configuration", changed, f'<div class="columns">{"".join(tables)}</div>')


def _step(event: dict) -> str:
    return "" if event["step"] is None else f"{event['step']:,}"
