"""Charts of a run's measurements over steps or running time, as SVG by matplotlib, each with its values in words."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from fastmae.optional import require
from fastmae.train.report.history import History
from fastmae.train.units import number

BINS = 400  # of a line; about one for two of the pixels that it is drawn with
_LOG_RATIO = 5.0  # greatest over least value from which on an axis is logarithmic
_MARKS, _LABELS = 60, 8  # vertical lines of a chart, and up to how many are labelled; more would hide it
_SIZE, _WIDE = (6.2, 2.4), (12.8, 3.4)  # inches; 96 pixels each on a screen
_BLUE, _RED, _GREY, _RULE = "#0b62c4", "#c4320a", "#57606a", "#d8dee4"
_STYLE = {"svg.fonttype": "path", "svg.hashsalt": "fastmae", "savefig.transparent": True,
          "font.size": 9, "text.color": _GREY, "axes.edgecolor": _RULE, "axes.labelcolor": _GREY, "xtick.color": _GREY,
          "ytick.color": _GREY, "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False,
          "axes.grid": True, "axes.grid.axis": "y", "grid.color": _RULE, "ytick.major.size": 0, "ytick.minor.size": 0,
          "axes.axisbelow": True, "axes.formatter.useoffset": False, "lines.linewidth": 1.4,
          "axes.autolimit_mode": "round_numbers", "axes.xmargin": 0, "axes.ymargin": 0}  # fmt: skip

Point = tuple[float, float | None]
"""None: not a finite number."""


@dataclass(frozen=True, kw_only=True)
class Chart:
    """One curve. Points and dots rise in x; values are below 1e100."""

    name: str
    """Unique on the page."""
    title: str
    points: Sequence[Point]
    x_name: str = "step"
    unit: str = ""
    """Follows each value."""
    from_zero: bool = False
    """Whether the axis starts at 0; other axes are logarithmic where positive values differ by more than five times."""
    marks: Sequence[tuple[float, str]] = ()
    """(x, label) of vertical lines."""
    dots: Sequence[tuple[float, float]] = ()
    """Points apart from the line."""

    @property
    def missing(self) -> int:
        """Points without a finite value."""
        return sum(y is None for _, y in self.points)

    @property
    def description(self) -> str:
        """Last, lowest and highest value."""
        finite = [p for p in self.points if p[1] is not None]
        named = {"last": finite[-1], "lowest": min(finite, key=lambda p: p[1]), "highest": max(finite, key=lambda p: p[1])}
        where = "at step {:,.0f}" if self.x_name == "step" else f"after {{:,.3g}} {self.x_name}"
        parts = [f"{word} {y:.4g}{self.unit} {where.format(x)}" for word, (x, y) in named.items()]
        return "; ".join(parts + ([f"{self.missing} of {len(self.points)} not finite"] if self.missing else []))

    def draw(self) -> str:
        """The SVG document, the same bytes for the same points. Raises InputError without matplotlib."""
        figures, styles = (require(f"matplotlib.{part}", "`fastmae report`") for part in ("figure", "style"))
        with styles.context(["default", _STYLE]):
            figure = figures.Figure(figsize=_WIDE if self.name == "loss" else _SIZE)
            # Margins are the same in all charts: 0.75 inches for labels of values, 0.35 for half of the last label below.
            width, height = figure.get_size_inches()
            figure.subplots_adjust(0.75 / width, 0.45 / height, 1 - 0.35 / width, 1 - 0.2 / height)
            self._plot(figure.subplots())
            file = io.StringIO()
            figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
        return file.getvalue()

    def _plot(self, axes) -> None:
        at_edge = axes.get_xaxis_transform()  # x is a value, y a share of the height
        x, low, mean, high = bins(self.points)
        if self.is_binned:
            axes.fill_between(x, low, high, color=_BLUE, alpha=0.3, linewidth=0)
        known = np.isfinite(np.pad(mean, 1, constant_values=np.nan))
        alone = np.flatnonzero(known[1:-1] & ~known[:-2] & ~known[2:])
        axes.plot(x, mean, color=_BLUE, marker="o", markersize=3, markevery=alone.tolist())
        dots_x, _, _, dots_y = bins(self.dots)
        axes.plot(dots_x, dots_y, "o", color=_RED, fillstyle="none", markersize=6)
        gaps = bins([(x, 0.0) for x, y in self.points if y is None])[0]
        axes.plot(gaps, np.zeros_like(gaps), "|", color=_RED, markersize=10, transform=at_edge, clip_on=False)
        self._scale(axes)
        left, right = axes.get_xlim()
        inside = [(at, label) for at, label in self.marks if left <= at <= right]
        for at, label in inside[-_MARKS:]:
            axes.axvline(at, color=_GREY, linestyle="--", linewidth=0.7)
            if len(inside) <= _LABELS:
                axes.annotate(label, (at, 1), (0, 2), xycoords=at_edge, textcoords="offset points", ha="center")

    def _scale(self, axes) -> None:
        values = [y for _, y in (*self.points, *self.dots) if y is not None]
        (first, _), (last, _) = self.points[0], self.points[-1]
        axes.set_xlabel(self.x_name)
        if self.is_log:
            axes.set_yscale("log")
            axes.yaxis.get_major_locator().set_params(subs=(1, 2, 5) if max(values) < 100 * min(values) else (1,))
            axes.yaxis.set_minor_formatter("")
        axes.update_datalim([(0 if first < last / 2 else first, min(*values, 0) if self.from_zero else values[0])])
        axes.autoscale_view()
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.10g}{self.unit}")

    @property
    def is_binned(self) -> bool:
        """Whether the line is of means, within the range of each part of x."""
        return len(self.points) > 2 * BINS

    @property
    def is_log(self) -> bool:
        """Whether the values' axis is logarithmic."""
        values = [y for _, y in (*self.points, *self.dots) if y is not None]
        return not self.from_zero and min(values) > 1e-100 and max(values) > _LOG_RATIO * min(values)


def bins(points: Sequence[Point]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Position, least, mean and greatest value of up to ``BINS`` equal parts of x, float64; NaN where a part has no value.

    Up to 2 * ``BINS`` points are kept as they are.
    """
    x, y = np.array([(x, np.nan if y is None else y) for x, y in points], dtype=np.float64).reshape(-1, 2).T
    if len(x) <= 2 * BINS:
        return x, y, y, y
    part = np.minimum(((x - x[0]) / ((x[-1] - x[0]) / BINS or 1.0)).astype(int), BINS - 1)
    groups = [(x[i], y[i][np.isfinite(y[i])]) for i in np.split(np.arange(len(x)), np.flatnonzero(np.diff(part)) + 1)]
    rows = [(at.mean(), *((v.min(), v.mean(), v.max()) if len(v) else (np.nan,) * 3)) for at, v in groups]
    return tuple(np.array(rows).T)


def run_charts(history: History) -> list[Chart]:
    """The charts of a run that have any value."""
    measurements = history.measurements
    # Running time: a pause of a week between attempts would leave no room for anything else.
    longest = max((m.running or 0.0 for m in measurements), default=0.0)
    unit, seconds = ("hours", 3600.0) if longest > 7200 else ("minutes", 60.0) if longest > 120 else ("seconds", 1.0)
    labels = [str(a.number) for a in history.attempts[1:]]
    restarts = list(zip([a.first_step for a in history.attempts[1:]], labels, strict=True))
    timed = list(zip(accumulate(a.seconds / seconds for a in history.attempts[:-1]), labels, strict=True))
    spikes = [(e["step"], number(e.get("loss"))) for e in history.events.get("spike", ()) if e["step"] is not None]

    def by_step(name: str, title: str, key: str, **options) -> Chart:
        points = [(m.step, m.values[key]) for m in measurements if key in m.values]
        return Chart(name=name, title=title, points=points, marks=restarts, **options)

    def by_time(name: str, title: str, key: str, scale: float = 1, **options) -> Chart:
        points = [(m.running / seconds, m.values[key] and m.values[key] * scale) for m in measurements
                  if key in m.values and m.running is not None]  # fmt: skip
        return Chart(name=name, title=title, points=points, x_name=unit, from_zero=True, marks=timed, **options)

    charts = [
        by_step("loss", "Loss", "loss", dots=sorted((step, loss) for step, loss in spikes if loss is not None)),
        by_step("lr", "Learning rate", "lr", from_zero=True),
        by_step("grad-norm", "Gradient norm", "grad_norm"),
        by_time("throughput", "Images per second", "images_per_second"),
        by_time("data-wait", "Data wait, share of the step", "data_wait", 100, unit="%"),
        by_time("mfu", "Model FLOPs utilisation", "mfu", 100, unit="%"),
        by_time("memory", "Peak memory", "memory_bytes", 2**-30, unit=" GiB"),
    ]
    return [chart for chart in charts if chart.missing < len(chart.points)]
