"""One HTML page about a run, from its log: self-contained, legible without scripts, and the same on paper.

Nothing on it is fetched: pictures are data URIs, curves inline SVG, and its Content-Security-Policy allows no more than that,
the one style sheet and the one script. Whatever comes from a file is escaped.
"""

import base64
import io
import statistics
import time
from itertools import accumulate
from pathlib import Path

from PIL import Image

from fastmae.errors import InputError
from fastmae.files import write_atomically
from fastmae.model.config import PRESETS, ModelConfig
from fastmae.train.report import curves, tables
from fastmae.train.report.history import History, read_history
from fastmae.train.report.html import escape_text, make_document, make_section
from fastmae.train.units import format_count, format_duration, format_time, format_value, number

_PICTURES = 6
_PICTURE_SIZE = (720, 1800)  # pixels, width and height at most
_PICTURE_BYTES, _PICTURE_PIXELS = 64 << 20, 64 << 20  # a larger picture is not decoded


def write_report(run: Path, out: Path | None = None) -> Path:
    """Write the page about the run in the folder ``run`` to ``out``, by default ``run/report.html``; return its path.

    Raises InputError if there is no log that can be read or the page cannot be written.
    """
    out = run / "report.html" if out is None else out
    if out.is_dir():
        raise InputError(f"{out}: is a folder; give the page's file name, as in {out / 'report.html'}")
    page = _page(run, read_history(run), time.time())
    with write_atomically(out) as file:
        file.write(page.encode())
    return out


def _page(run: Path, history: History, now: float) -> str:
    parts = [_head(run, history, now), _curves(history), _reconstructions(run, history), tables.restarts(history),
             tables.faults(history), tables.checkpoints(history), tables.configuration(history)]  # fmt: skip
    damaged = f" {format_count(history.unreadable, 'line')} of it could not be read." if history.unreadable else ""
    title = f"{run.resolve().name}: {_model(history)}"
    return make_document(title, parts, f"From the run's metrics.jsonl as it was at {format_time(now)}.{damaged}")


def _head(run: Path, history: History, now: float) -> str:
    last, total, state = history.last, history.total_steps, history.state(now)
    losses = [m.values["loss"] for m in history.measurements if "loss" in m.values]
    rates = [r for m in history.measurements if (r := m.values.get("images_per_second")) is not None]
    newest = history.measurements[-1].values if history.measurements else {}
    moments = (("Started", history.attempts[0].began), ("Last record", last.ended))
    times = " ".join(f"{name} {format_time(t)}." for name, t in moments if format_time(t))
    facts = {
        "steps": (f"{last.last_step:,}", f"of {total:,}" if total else ""),
        "loss": ("none yet" if not losses else "not finite" if losses[-1] is None else f"{losses[-1]:.4f}", ""),
        "images/s": (f"{rates[-1]:,.1f}", f"median {statistics.median(rates):,.1f}") if rates else ("none yet", ""),
        "epochs": ("" if newest.get("epoch") is None else f"{newest['epoch']:,.2f}", ""),
        "learning rate": ("" if newest.get("lr") is None else f"{newest['lr']:.3g}", ""),
        "running time": (format_duration(sum(a.seconds for a in history.attempts)), ""),
        "time left": (_left(history) if state == "running" else "", ""),
    }
    figures = "".join(f"<div><dt>{name}</dt><dd>{escape_text(value)}{more and f'<small>{escape_text(more)}</small>'}</dd></div>"
                      for name, (value, more) in facts.items() if value)  # fmt: skip
    done = min(last.last_step, total or 0)
    bar = f'<progress aria-label="steps done" max="{total}" value="{done}"></progress>' if total else ""
    return (
        f'<header>\n<p class="soft">{escape_text(run.resolve().name)}</p>\n<h1>{escape_text(_model(history))}</h1>\n'
        f'<p><span class="state {state}">{state}</span> {escape_text(_sentence(history, state, now))}</p>\n'
        f'<p class="soft">{times}</p>\n{bar}\n'
        f"<dl>{figures}</dl>\n</header>"
    )


def _sentence(history: History, state: str, now: float) -> str:
    """What the state means, and what can be done."""
    last = history.last
    step, reason = f"{last.last_step:,}", f": {last.reason}" if last.reason else ""
    return {
        "running": f"The last record is {format_duration(now - last.ended)} old." if last.ended is not None else "",
        "finished": f"All {step} steps are done.",
        "stopped": f"Stopped after step {step}{reason}; the same command continues it.",
        "diverged": f"Gave up at step {step}{reason}",
        "silent": "Nothing has been logged for "
        + (format_duration(now - last.ended) if last.ended is not None else "an unknown time")
        + ": killed or stuck. The same command continues it from its newest checkpoint.",
    }[state]


def _left(history: History) -> str:
    recent = [s for m in history.measurements[-10:] if (s := m.values.get("seconds_per_step")) is not None]
    total = history.total_steps
    return f"about {format_duration(statistics.median(recent) * (total - history.last.last_step))}" if recent and total else ""


def _model(history: History) -> str:
    """The model in a few words: its preset's name, or its width and depth."""
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


def _curves(history: History) -> str:
    measurements = history.measurements
    restarts = [(a.first_step, str(a.number)) for a in history.attempts[1:]]
    # Hours that the run was running: a pause of a week would leave no room for anything else.
    longest = max((m.running or 0.0 for m in measurements), default=0.0)
    unit, length = ("hours", 3600.0) if longest > 7200 else ("minutes", 60.0) if longest > 120 else ("seconds", 1.0)
    ends = accumulate(a.seconds / length for a in history.attempts[:-1])
    timed_restarts = [(at, str(a.number)) for at, a in zip(ends, history.attempts[1:], strict=True)]
    spikes = [(e["step"], number(e.get("loss"))) for e in history.events.get("spike", ()) if e["step"] is not None]
    spikes = sorted((step, loss) for step, loss in spikes if loss is not None)

    def by_step(name: str, title: str, key: str, **options) -> str:
        points = [(m.step, m.values[key]) for m in measurements if key in m.values]
        return curves.figure(name, title, points, marks=restarts, **options)

    def by_time(name: str, title: str, key: str, scale: float = 1, **options) -> str:
        points = [(m.running / length, m.values[key] and m.values[key] * scale) for m in measurements
                  if key in m.values and m.running is not None]  # fmt: skip
        return curves.figure(name, title, points, x_name=unit, from_zero=True, marks=timed_restarts, **options)

    drawn = [
        by_step("loss", "Loss", "loss", dots=spikes),
        by_step("lr", "Learning rate", "lr", from_zero=True),
        by_step("grad-norm", "Gradient norm", "grad_norm"),
        by_time("throughput", "Images per second", "images_per_second"),
        by_time("data-wait", "Data wait, share of the step", "data_wait", 100, unit="%"),
        by_time("mfu", "Model FLOPs utilisation", "mfu", 100, unit="%"),
        by_time("memory", "Peak memory", "memory_bytes", 2**-30, unit=" GiB"),
    ]
    drawn = [d for d in drawn if d]
    if not drawn:
        return make_section("curves", "Curves", "<p>No measurement with a finite value has been logged.</p>")
    notes = ["Loss is the mean squared error of masked patches over a log interval."]
    notes += [f"{unit.capitalize()} are running time, without the pauses between attempts."] if restarts else []
    notes += ["Dashed lines are restarts, with the attempt's number."] if restarts else []
    notes += ["Pale strokes reach from the least to the greatest value."] if 'class="range"' in "".join(drawn) else []
    notes += ["Circles are loss spikes."] if spikes else []
    notes += ["Strokes at the foot are intervals without a finite value."] if 'class="gap"' in "".join(drawn) else []
    legend = f'<p class="soft">{" ".join(notes)}</p>'
    return make_section("curves", "Curves", legend, f'<div class="curves">{"".join(drawn)}</div>')


def _reconstructions(run: Path, history: History) -> str:
    by_step = {e["step"]: e.get("file") for e in history.events.get("reconstruction", ()) if e["step"] is not None}
    steps = sorted(by_step)
    if not steps:
        return ""
    count = min(_PICTURES, len(steps))
    chosen = [steps[round(i * (len(steps) - 1) / max(1, count - 1))] for i in range(count)]
    drawn = []
    for step in chosen:
        try:
            picture = _picture(run, by_step[step])
            content = f'<img src="{picture}" alt="original, masked, reconstruction, and that with the visible patches">'
        except InputError as error:
            content = f'<p class="missing">{escape_text(str(error))}</p>'
        drawn.append(f"<figure><figcaption><b>Step {step:,}</b></figcaption>{content}</figure>")
    said = "Each row is one image: original, masked, reconstruction, and that with the visible patches."
    said += f" {count} of {len(steps)}, evenly over the run." if count < len(steps) else ""
    pictures = f'<div class="pictures">{"".join(drawn)}</div>'
    return make_section("reconstructions", "Reconstructions", f'<p class="soft">{said}</p>', pictures)


def _picture(run: Path, file: object) -> str:
    """A PNG of the run as a data URI, made smaller if it is large. Raises InputError that says why it cannot be shown."""
    if not isinstance(file, str):
        raise InputError("the log names no file")
    try:
        path = (run / file).resolve()
        if not path.is_relative_to(run.resolve()):
            raise InputError(f"{file}: lies outside the run's folder and is not shown")
        if not path.is_file() or path.stat().st_size > _PICTURE_BYTES:
            raise InputError(f"{file}: {'too large' if path.is_file() else 'missing'}")
        with Image.open(path, formats=("PNG",)) as opened:
            if opened.width * opened.height > _PICTURE_PIXELS:
                raise InputError(f"{file}: too large")
            picture = opened.convert("RGB")
    except InputError:
        raise
    except (OSError, ValueError, SyntaxError, RuntimeError, Image.DecompressionBombError) as error:
        raise InputError(f"{file}: cannot be read as a PNG") from error
    picture.thumbnail(_PICTURE_SIZE)
    data = io.BytesIO()
    picture.save(data, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}"
