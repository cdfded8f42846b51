"""Charts: binned without losing a spike, drawn for any values, and the same bytes each time."""

from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.figure import Figure

from fastmae.train.report.charts import BINS, Chart, bins

SVG = "{http://www.w3.org/2000/svg}"


def chart(points, **options):
    return Chart(name="x", title="X", points=points, **options)


def drawn(points, **options):
    return ElementTree.fromstring(chart(points, **options).draw())


def line_of(svg):
    """The subpaths of the curve: lists of (x, y) in points, y downwards."""
    (group,) = [g for g in svg.iter(f"{SVG}g") if "line2d" in g.get("id", "") and (p := g.find(f"{SVG}path")) is not None
                and "#0b62c4" in p.get("style")]  # fmt: skip
    tokens = group.find(f"{SVG}path").get("d").replace("M", "|").replace("L", "").split("|")[1:]
    return [np.array(part.split(), dtype=float).reshape(-1, 2) for part in tokens]


def test_every_spike_and_gap_survives_binning():
    points = [(float(x), 1.0 + 0.01 * (x % 7)) for x in range(20_000)]
    points[7777], points[12_345] = (7777.0, 90.0), (12_345.0, -4.0)
    points[15_000:15_100] = [(float(x), None) for x in range(15_000, 15_100)]
    x, low, mean, high = bins(points)
    assert len(x) == BINS and (np.diff(x) > 0).all() and np.nanmax(high) == 90.0 and np.nanmin(low) == -4.0
    assert np.flatnonzero(np.isnan(mean)).tolist() == [300, 301]  # parts are 50 wide
    finite = [y for _, y in points if y is not None]
    assert (low <= mean)[np.isfinite(mean)].all() and np.nanmean(mean) == pytest.approx(np.mean(finite), rel=0.01)


def test_few_points_are_kept_as_they_are():
    x, low, mean, high = bins([(0.0, 1.0), (1.0, None), (1.0, 2.0)])
    np.testing.assert_array_equal(x, [0, 1, 1])
    for values in (low, mean, high):
        np.testing.assert_array_equal(values, [1, np.nan, 2])
    assert [len(part) for part in bins([])] == [0, 0, 0, 0]


def test_positions_are_those_of_the_values():
    (line,) = line_of(drawn([(0, 1.0), (50, 3.0), (100, 2.0)]))
    (x0, y0), (x1, y1), (x2, y2) = line
    assert x1 - x0 == pytest.approx(x2 - x1) and y0 - y2 == pytest.approx((y0 - y1) / 2) and y1 < y0


def test_a_wide_range_of_positive_values_is_drawn_logarithmically():
    wide = [(0, 100.0), (1, 10.0), (2, 1.0)]
    (line,) = line_of(drawn(wide))
    assert line[1, 1] - line[0, 1] == pytest.approx(line[2, 1] - line[1, 1])
    assert chart(wide).is_log and not chart(wide, from_zero=True).is_log
    assert not chart([(0, 3.0), (1, 1.0)]).is_log and not chart([(0, 100.0), (1, 0.0)]).is_log


def test_a_value_that_is_none_breaks_the_line_and_is_counted():
    one = chart([(0, 1.0), (1, 1.0), (2, None), (3, 2.0), (4, 2.0), (5, None), (6, 1.0), (7, 1.0)])
    assert len(line_of(ElementTree.fromstring(one.draw()))) == 3
    assert (
        one.missing == 2 and one.description == "last 1 at step 7; lowest 1 at step 0; highest 2 at step 3; 2 of 8 not finite"
    )


def test_only_the_newest_of_many_restarts_are_drawn():
    points = [(float(x), 1.0) for x in range(101)]
    few, many = [(25, "2"), (75, "3"), (999, "4")], [(x / 2, "7") for x in range(199)]
    lines = [sum("stroke-dasharray: 2.59" in path.get("style", "") for path in drawn(points, marks=marks).iter(f"{SVG}path"))
             for marks in ((), few, many)]  # fmt: skip
    assert lines == [0, 2, 60]


@pytest.mark.parametrize(
    "points",
    [[(5, 0.0)], [(0, 1e99), (1, -1e99)], [(0, 1e-300), (1, 0.0)], [(1e12, 7.0), (1e12, 7.0)], [(0, 1e-90), (1, 1e90)],
     [(0, None), (1, -2.0), (2, None)]],
)  # fmt: skip
@pytest.mark.parametrize("from_zero", [True, False])
def test_any_values_are_drawn(points, from_zero):
    text = chart(points, from_zero=from_zero, dots=[p for p in points if p[1] is not None]).draw()
    assert text == chart(points, from_zero=from_zero, dots=[p for p in points if p[1] is not None]).draw()
    assert "nan" not in text and "<dc:date>" not in text and line_of(ElementTree.fromstring(text)) is not None


def test_thousands_of_points_make_a_small_chart():
    points = [(float(x), np.sin(x / 1000) + 2 + x % 2) for x in range(50_000)]
    assert len(chart(points).draw()) < 100_000


@pytest.mark.parametrize("last", [2000.0, 1_000_000.0])
def test_labels_lie_inside_the_picture(last, monkeypatch):
    outside = []

    def measure(figure, *_, **__):
        for axis in (figure.axes[0].xaxis, figure.axes[0].yaxis):
            box, page = axis.get_tightbbox(), figure.bbox
            outside.append((box.x0 < page.x0, box.y0 < page.y0, box.x1 > page.x1, box.y1 > page.y1))

    monkeypatch.setattr(Figure, "savefig", measure)
    chart([(1.0, 1e-5), (last, 3e-5)]).draw()
    assert outside == [(False,) * 4] * 2
