"""The chart of ``scaling``: milliseconds of a step against GPUs, a panel for each model, strong scaling above, weak below."""

import hashlib
import json
import math
from pathlib import Path

# (key of a row, how it is shared, label, colour, style)
_LINES = (
    ("gpu_milliseconds", ("ddp", "fp32"), "DDP, fp32", "#c8501e", "-"),
    ("gpu_milliseconds", ("hsdp", "bf16"), "HSDP, bf16", "#1f5fa8", "-"),
    ("work_milliseconds", ("ddp", "fp32"), "the work alone", "#222222", (0, (4, 2))),
    ("cpu_milliseconds", ("ddp", "fp32"), "vote + launches", "#8a8a8a", (0, (1, 1.5))),
)
_NAMES = {"base": "ViT-B/16", "large": "ViT-L/16", "huge": "ViT-H/14"}
_INK, _GRID = "#333333", "#e6e6e6"
_APART = 1.42  # ratio of two labels' positions on the logarithmic axis, at least


def digest(section: dict) -> str:
    """Of the numbers that are drawn; written into the picture, so that a test recognises an old one."""
    drawn = [[round(_value(r, key), 6) for r in section["strong"] + section["weak"]] for key in sorted({x[0] for x in _LINES})]
    return hashlib.sha256(json.dumps(drawn).encode()).hexdigest()[:16]


def draw(section: dict, path: Path) -> None:
    """Write the chart, a PNG."""
    from matplotlib.figure import Figure  # slow to import

    models = list(dict.fromkeys(r["model"] for r in section["strong"]))
    figure = Figure(figsize=(1.6 + 3.2 * len(models), 6.6), layout="constrained", dpi=130, facecolor="white")
    panels = figure.subplots(2, len(models), squeeze=False, sharex=True, sharey="row")
    kinds = (("strong", f"{section['effective_batch']} images per step"), ("weak", f"{section['micro_batch']} images per GPU"))
    for (kind, title), row in zip(kinds, panels, strict=True):
        for model, panel in zip(models, row, strict=True):
            _panel(panel, [r for r in section[kind] if r["model"] == model])
            panel.set_title(f"{_NAMES.get(model, model)}, {title}", fontsize=9.5, color=_INK, loc="left")
        row[0].set_ylabel("step, ms", fontsize=9, color=_INK)
    for panel in panels[1]:
        panel.set_xlabel("GPUs", fontsize=9, color=_INK)
    _label(panels[0][-1])
    figure.savefig(path, metadata={"Description": digest(section), "Software": None})


def _panel(panel, rows: list[dict]) -> None:
    from matplotlib.ticker import LogLocator

    for key, way, label, color, style in _LINES:
        points = sorted((r["gpus"], _value(r, key)) for r in rows if (r["parallel"], r["reduce"]) == way)
        panel.plot(*zip(*points, strict=True), color=color, linestyle=style, linewidth=1.8, label=label)
    gpus = sorted({r["gpus"] for r in rows})
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.set_xticks(gpus, [str(g) for g in gpus])
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    panel.minorticks_off()
    panel.grid(color=_GRID, linewidth=0.8)
    panel.set_axisbelow(True)
    panel.tick_params(length=0, labelsize=8.5, labelcolor=_INK)
    panel.spines[:].set_visible(False)


def _label(panel) -> None:
    """Each line's name behind its end, moved down where two would overlap."""
    above = math.inf
    for line in sorted(panel.get_lines(), key=lambda x: -x.get_ydata()[-1]):
        x, y = line.get_xdata()[-1], line.get_ydata()[-1]
        above = min(y, above / _APART)
        panel.annotate(line.get_label(), (x, above), (7, 0), textcoords="offset points", color=line.get_color(), va="center",
                       fontsize=9.5, annotation_clip=False)  # fmt: skip


def _value(row: dict, key: str) -> float:
    return row["vote_milliseconds"] + row["launches_milliseconds"] if key == "cpu_milliseconds" else row[key]
