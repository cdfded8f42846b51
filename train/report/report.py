"""One HTML page about a run, from its log: self-contained, without scripts, and the same on paper.

Nothing on it is fetched: pictures and charts are data URIs, and its Content-Security-Policy allows no more than those and the
one style sheet. Whatever comes from a file is escaped by the template.
"""

import base64
import hashlib
import statistics
import time
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from fastmae.errors import InputError
from fastmae.files import write_atomically
from fastmae.model.config import PRESETS, ModelConfig
from fastmae.train.report import tables
from fastmae.train.report.charts import run_charts
from fastmae.train.report.history import History, read_history
from fastmae.train.report.reconstructions import reconstructions
from fastmae.train.units import format_count, format_duration, format_time, format_value

_LONGEST = 300  # letters of a text


def write_report(run: Path, out: Path | None = None) -> Path:
    """Write the page about the run in the folder ``run`` to ``out``, by default ``run/report.html``; return its path.

    Raises InputError if there is no log that can be read, matplotlib is missing or the page cannot be written; DataError if
    the log is damaged or of another version.
    """
    out = run / "report.html" if out is None else out
    if out.is_dir():
        raise InputError(f"{out}: is a folder; give the page's file name, as in {out / 'report.html'}")
    page = _page(run, read_history(run), time.time())
    with write_atomically(out) as file:
        file.write(page.encode())
    return out


def _page(run: Path, history: History, now: float) -> str:
    folder = Path(__file__).parent
    environment = Environment(loader=FileSystemLoader(folder), autoescape=True, finalize=_clean, undefined=StrictUndefined,
                              trim_blocks=True, lstrip_blocks=True)  # fmt: skip
    style = (folder / "page.css").read_text()
    pictures, drawn = reconstructions(run, history)
    return environment.get_template("page.html.j2").render(
        name=run.resolve().name,
        model=_model(history),
        state=history.state(now),
        sentence=_sentence(history, now),
        times=[(name, format_time(moment)) for name, moment in
               (("Started", history.attempts[0].began), ("Last record", history.last.ended))],
        last_step=history.last.last_step,
        total=history.total_steps,
        facts=_facts(history, now),
        charts=run_charts(history),
        pictures=pictures,
        drawn=drawn,
        sections=[section(history) for section in (tables.restarts, tables.errors, tables.checkpoints, tables.configuration)],
        now=format_time(now),
        unreadable=format_count(history.unreadable, "line") if history.unreadable else "",
        style=Markup(style),
        style_hash=base64.b64encode(hashlib.sha256(style.encode()).digest()).decode(),
        svg_uri=lambda svg: Markup(f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}"),
        trusted=Markup,
    )  # fmt: skip


def _clean(value: object) -> object:
    """Text that XML may hold: without control characters or lone surrogates, and not endless; the template escapes it."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    named = "".join(f"\\u{ord(c):04x}" if "\udc80" <= c <= "\udcff" else c for c in value[: _LONGEST + 1])  # of no UTF-8
    clean = "".join(c if c.isprintable() else " " for c in named)
    return clean if len(clean) <= _LONGEST else f"{clean[:_LONGEST]}…"


def _facts(history: History, now: float) -> list[tuple[str, str, str]]:
    """Name, value and a remark of what the head of the page shows; those without a value are not shown."""
    last, total = history.last, history.total_steps
    losses = [m.values["loss"] for m in history.measurements if "loss" in m.values]
    rates = [r for m in history.measurements if (r := m.values.get("images_per_second")) is not None]
    newest = history.measurements[-1].values if history.measurements else {}
    epoch, lr = newest.get("epoch"), newest.get("lr")
    return [
        ("steps", f"{last.last_step:,}", f"of {total:,}" if total else ""),
        ("loss", "none yet" if not losses else "not finite" if losses[-1] is None else f"{losses[-1]:.4f}", ""),
        ("images/s", f"{rates[-1]:,.1f}" if rates else "none yet", f"median {statistics.median(rates):,.1f}" if rates else ""),
        ("epochs", "" if epoch is None else f"{epoch:,.2f}", ""),
        ("learning rate", "" if lr is None else f"{lr:.3g}", ""),
        ("running time", format_duration(sum(a.seconds for a in history.attempts)), ""),
        ("time left", _left(history) if history.state(now) == "running" else "", ""),
    ]


def _sentence(history: History, now: float) -> str:
    """What the state means, and what can be done."""
    last = history.last
    step, reason = f"{last.last_step:,}", f": {last.reason}" if last.reason else ""
    age = "an unknown time" if last.ended is None else format_duration(now - last.ended)
    return {
        "running": f"The last record is {age} old.",
        "finished": f"All {step} steps are done.",
        "stopped": f"Stopped after step {step}{reason}; the same command resumes it.",
        "diverged": f"Gave up at step {step}{reason}",
        "silent": f"Nothing has been logged for {age}: killed or stuck. The same command resumes its newest checkpoint.",
    }[history.state(now)]


def _left(history: History) -> str:
    recent = [s for m in history.measurements[-10:] if (s := m.values.get("seconds_per_step")) is not None]
    total = history.total_steps
    return f"about {format_duration(statistics.median(recent) * (total - history.last.last_step))}" if recent and total else ""


def _model(history: History) -> str:
    """The model's preset, or its width and depth."""
    settings = next((a.settings["model"] for a in reversed(history.attempts) if "model" in a.settings), {})
    if not {"embed_dim", "depth", "patch_size"} <= settings.keys():
        return "masked autoencoder"
    standard, patch = vars(ModelConfig()), format_value(settings["patch_size"])
    names = (n for n, preset in PRESETS.items() if all(settings.get(k, standard[k]) == v for k, v in preset.items()))
    size = next((f"-{name}/{patch}" for name in names),
                f", width {format_value(settings['embed_dim'])}, depth {format_value(settings['depth'])}, "
                f"patches of {patch}")  # fmt: skip
    images = format_value(settings.get("img_size", "")).replace(", ", " × ")
    return f"MAE ViT{size}" + (f", images {images}" if images else "")
