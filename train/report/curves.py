"""Curves over a run's steps or hours as inline SVG, legible without scripts; a small script reads values off under a pointer.

Text keeps its size at any width: labels stand at percentages of the plot, which is the SVG's content box, and only the line's
own coordinates, 0 to 1000 both ways, are stretched. Labels stand in the SVG's padding.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from statistics import fmean
from typing import NamedTuple

BINS = 400  # of a curve; about one for two of the pixels it is drawn with
_MARKS, _LABELS = 60, 8  # vertical lines of a curve, and up to how many are named; more would hide it
_LOG_FROM = 5.0  # greatest over least value from which on a scale is logarithmic

_LEAST = 1e-100  # values and ranges below count as 0: ticks must not underflow

STYLE = """
figure { margin: 0; min-width: 0; }
figcaption { display: flex; flex-wrap: wrap; gap: 0 .75em; align-items: baseline; margin-bottom: .25rem; }
figcaption .read { margin-left: auto; font-variant-numeric: tabular-nums; color: var(--soft); min-height: 1.4em; }
svg.curve { box-sizing: border-box; display: block; width: 100%; height: 15rem; padding: .5rem .75rem 1.75rem 3.5rem;
  overflow: visible; font-size: .75rem; touch-action: pan-y; }
#loss svg.curve { height: 20rem; }
svg.curve svg { overflow: visible; }
svg.curve text { fill: var(--soft); font-variant-numeric: tabular-nums; }
svg.curve .grid { stroke: var(--rule); }
svg.curve path { fill: none; stroke: var(--accent); stroke-width: 1.75; stroke-linejoin: round; stroke-linecap: round;
  vector-effect: non-scaling-stroke; }
svg.curve .range { opacity: .35; stroke-width: 1; }
svg.curve .mark { stroke: var(--soft); stroke-dasharray: 3 3; }
svg.curve .dot { fill: none; stroke: var(--bad); stroke-width: 1.5; }
svg.curve .gap { stroke: var(--bad); stroke-width: 2; }
svg.curve .cursor { stroke: var(--text); }
svg.curve circle.cursor { fill: var(--accent); }
"""

SCRIPT = """
for (const svg of document.querySelectorAll('svg.curve')) {
  const read = svg.closest('figure').querySelector('.read');
  const [line, dot] = svg.querySelectorAll('.cursor');
  const { x0, x1, y0, y1, log, unit, x } = svg.dataset;
  const path = svg.querySelector('.line').getAttribute('d');
  const points = [...path.matchAll(/[ML]([\\d.-]+) ([\\d.-]+)/g)].map(m => [+m[1], +m[2]]);
  if (!points.length) continue;
  const say = v => (Math.abs(v) < 1e-3 && v ? v.toExponential(3) : v.toLocaleString('en', { maximumSignificantDigits: 5 }));
  const hide = () => { for (const e of [line, dot]) e.setAttribute('visibility', 'hidden'); read.textContent = ''; };
  svg.addEventListener('pointermove', event => {
    const style = getComputedStyle(svg), box = svg.getBoundingClientRect(), left = parseFloat(style.paddingLeft);
    const at = 1000 * (event.clientX - box.left - left) / (box.width - left - parseFloat(style.paddingRight));
    const [px, py] = points.reduce((a, b) => (Math.abs(b[0] - at) < Math.abs(a[0] - at) ? b : a));
    const scaled = +y1 - py / 1000 * (y1 - y0), step = +x0 + px / 1000 * (x1 - x0);
    read.textContent = `${x} ${say(x === 'step' ? Math.round(step) : step)}: ${say(log ? 10 ** scaled : scaled)}${unit}`;
    for (const name of ['x1', 'x2']) line.setAttribute(name, px / 10 + '%');
    dot.setAttribute('cx', px / 10 + '%');
    dot.setAttribute('cy', py / 10 + '%');
    for (const e of [line, dot]) e.setAttribute('visibility', 'visible');
  });
  svg.addEventListener('pointerleave', hide);
}
"""

Point = tuple[float, float | None]  # None: not a finite number


class Scale(NamedTuple):
    """From values to shares of a plot's length; ``low`` and ``high`` are exponents of ten if ``log``."""

    low: float
    high: float
    log: bool = False

    def percent(self, value: float) -> float:
        """0 at the low end, 100 at the high one."""
        return 100 * ((math.log10(value) if self.log else value) - self.low) / (self.high - self.low)


def figure(name: str, title: str, points: Sequence[Point], *, x_name: str = "step", unit: str = "", from_zero: bool = False,
           marks: Iterable[tuple[float, str]] = (), dots: Sequence[tuple[float, float]] = ()) -> str:  # fmt: skip
    """An HTML figure of one curve, or nothing if no point of ``points``, which rise in x, has a value.

    ``name``: unique on the page. ``unit`` follows each value. ``from_zero``: the scale starts at 0. ``marks``: (x, label) of
    vertical lines. ``dots``: points apart from the line, rising in x. The scale is logarithmic if values are positive and
    differ by more than five times. Values are less than 1e100.
    """
    if not any(y is not None for _, y in points):
        return ""
    values = [y for _, y in (*points, *dots) if y is not None]
    y_ticks, y_scale = _y_axis(min(values), max(values), from_zero)
    x_scale = _x_axis([x for x, _ in (*points, *dots)])
    parts = [*_grid(y_ticks, y_scale, unit), *_steps(x_scale), *_vertical_lines(marks, x_scale)]
    thinned = thin(points)
    for x in (x_scale.percent(x) for x, y in thinned if y is None):
        parts.append(f'<line class="gap" x1="{x:.2f}%" x2="{x:.2f}%" y1="96%" y2="100%"/>')
    lines = {"range": thinned, "line": means(points)} if len(thinned) < len(points) else {"line": points}
    paths = [f'<path class="{kind}" d="{_path(line, x_scale, y_scale)}"/>' for kind, line in lines.items()]
    parts.append(f'<svg viewBox="0 0 1000 1000" preserveAspectRatio="none">{"".join(paths)}</svg>')
    for x, y in thin(dots):
        parts.append(f'<circle class="dot" cx="{x_scale.percent(x):.2f}%" cy="{100 - y_scale.percent(y):.2f}%" r="4"/>')
    parts.append('<line class="cursor" y2="100%" visibility="hidden"/><circle class="cursor" r="4" visibility="hidden"/>')
    data = {"x0": f"{x_scale.low:.9g}", "x1": f"{x_scale.high:.9g}", "y0": f"{y_scale.low:.9g}", "y1": f"{y_scale.high:.9g}",
            "log": "1" if y_scale.log else "", "unit": unit, "x": x_name}  # fmt: skip
    attributes = " ".join(f'data-{key}="{escape(value)}"' for key, value in data.items())
    axes = f"by {escape(x_name)}{', logarithmic' if y_scale.log else ''}"
    return (
        f'<figure id="{name}"><figcaption><b>{escape(title)}</b> <span class="soft">{axes}</span><span class="read"></span>'
        f'</figcaption><svg class="curve" role="img" aria-labelledby="{name}-title {name}-desc" {attributes}>'
        f'<title id="{name}-title">{escape(title)} by {escape(x_name)}</title>'
        f'<desc id="{name}-desc">{escape(_describe(points, x_name, unit))}</desc>{"".join(parts)}</svg></figure>'
    )


def thin(points: Sequence[Point], bins: int = BINS) -> list[Point]:
    """At most three points of each of ``bins`` equal parts of x: the least, the greatest, and one without a value."""
    if len(points) <= 2 * bins:
        return list(points)
    chosen = [points[0], points[-1]]
    for part in _parts(points, bins):
        finite = [p for p in part if p[1] is not None]
        chosen += [min(finite, key=lambda p: p[1]), max(finite, key=lambda p: p[1])] if finite else []
        chosen += [p for p in part if p[1] is None][:1]
    return sorted(dict.fromkeys(chosen), key=lambda p: p[0])


def means(points: Sequence[Point], bins: int = BINS) -> list[Point]:
    """The mean point of each of ``bins`` equal parts of x that holds any; without a value where none of it has one."""
    found = []
    for part in _parts(points, bins):
        finite = [y for _, y in part if y is not None]
        found.append((fmean(x for x, _ in part), fmean(finite) if finite else None))
    return found


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers, about ``count``, the first at most ``low`` and the last at least ``high``."""
    low, high = _widen(low, high)
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12 - math.floor(math.log10(step))) for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Exponents of round numbers, at most about seven, the first at most ``low`` and the last at least ``high``."""
    first, last = math.floor(low), math.ceil(high + 1e-9)
    for digits in ((1, 2, 5), (1, 3), (1,)):
        found = [e + math.log10(m) for e in range(first, last + 1) for m in digits]
        below, above = max(t for t in found if t <= low + 1e-9), min(t for t in found if t >= high - 1e-9)
        inside = [t for t in found if below <= t <= above]
        if len(inside) <= 7:
            return inside
    every = math.ceil((last - first) / 6)
    return [float(e) for e in range(first, last + every, every)]


def label(value: float) -> str:
    """A short number: 0.42, 1.5e-4, 250k."""
    if value and not 1e-3 <= abs(value) < 1e15:
        mantissa, exponent = f"{value:.3g}".partition("e")[::2]
        return f"{mantissa}e{int(exponent)}" if exponent else mantissa
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 10 * size or (abs(value) >= size and size > 1e3):
            return f"{value / size:.4g}{letter}"
    return f"{value:.6g}"


def _widen(low: float, high: float) -> tuple[float, float]:
    """The two apart: a scale needs a length."""
    if high - low > max(_LEAST, 1e-6 * max(abs(low), abs(high))):
        return low, high
    margin = abs(low) / 10 if abs(low) > _LEAST else 1.0
    return low - margin, high + margin


def _y_axis(low: float, high: float, from_zero: bool) -> tuple[list[float], Scale]:
    """Round values, and the scale that reaches from the first to the last."""
    if not from_zero and low > _LEAST and high > _LOG_FROM * low:
        exponents = log_ticks(math.log10(low), math.log10(high))
        return [10.0**e for e in exponents], Scale(exponents[0], exponents[-1], log=True)
    found = ticks(min(low, 0.0) if from_zero else low, high)
    return found, Scale(found[0], found[-1])


def _x_axis(values: Sequence[float]) -> Scale:
    low, high = min(values), max(values)
    return Scale(*_widen(0.0 if 0 <= low < high / 2 else low, high))


def _grid(values: Sequence[float], scale: Scale, unit: str) -> Iterator[str]:
    for value in values:
        y = f"{100 - scale.percent(value):.2f}%"
        yield f'<line class="grid" x2="100%" y1="{y}" y2="{y}"/>'
        yield f'<text x="0" y="{y}" dx="-6" dy="4" text-anchor="end">{label(value)}{escape(unit)}</text>'


def _steps(scale: Scale) -> Iterator[str]:
    for value in ticks(scale.low, scale.high, 5):
        if scale.low <= value <= scale.high:
            yield f'<text x="{scale.percent(value):.2f}%" y="100%" dy="18" text-anchor="middle">{label(value)}</text>'


def _vertical_lines(marks: Iterable[tuple[float, str]], scale: Scale) -> Iterator[str]:
    inside = [(scale.percent(x), text) for x, text in marks if scale.low <= x <= scale.high]
    for x, text in inside[-_MARKS:]:
        yield f'<line class="mark" x1="{x:.2f}%" x2="{x:.2f}%" y2="100%"/>'
        if len(inside) <= _LABELS:
            yield f'<text x="{x:.2f}%" y="0" dx="4" dy="10">{escape(text)}</text>'


def _parts(points: Sequence[Point], bins: int) -> Iterable[list[Point]]:
    """``points`` by equal parts of x, empty ones left out."""
    left, width = points[0][0], (points[-1][0] - points[0][0]) / bins or 1.0
    parts: dict[int, list[Point]] = {}
    for x, y in points:
        parts.setdefault(min(bins - 1, int((x - left) / width)), []).append((x, y))
    return parts.values()


def _path(points: Sequence[Point], x_scale: Scale, y_scale: Scale) -> str:
    """Lines between points, broken where there is no value; a point alone is a line of no length, drawn round."""
    commands, before = [], None
    for (x, y), after in zip(points, [*[y for _, y in points[1:]], None], strict=True):
        if y is not None:
            at = f"{10 * x_scale.percent(x):.2f} {1000 - 10 * y_scale.percent(y):.2f}"
            commands.append(f"M{at}" if before is None else f"L{at}")
            if before is None and after is None:
                commands.append(f"L{at}")
        before = y
    return "".join(commands)


def _describe(points: Sequence[Point], x_name: str, unit: str) -> str:
    finite = [(x, y) for x, y in points if y is not None]
    first, last = finite[0], finite[-1]
    least, most = min(finite, key=lambda p: p[1]), max(finite, key=lambda p: p[1])
    said = [f"{word} {label(y)}{unit} at {x_name} {label(x)}"
            for word, (x, y) in (("first", first), ("last", last), ("least", least), ("greatest", most))]  # fmt: skip
    missing = len(points) - len(finite)
    return "; ".join(said + ([f"{missing} of {len(points)} measurements without a finite value"] if missing else []))
