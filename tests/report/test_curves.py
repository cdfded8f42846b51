"""Curves: thinned without losing a spike, on scales with round numbers, as SVG that parses and says in words what it shows."""

import math
import re
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmae.train.report.curves import BINS, Scale, figure, label, log_ticks, means, thin, ticks

finite = st.floats(allow_nan=False, allow_infinity=False, min_value=-1e100, max_value=1e100)


def parse(text):
    return ElementTree.fromstring(text)


def path_of(element, kind="line"):
    (path,) = [p for p in element.iter("path") if p.get("class") == kind]
    return path.get("d")


def test_every_spike_and_gap_survives_thinning():
    points = [(float(x), 1.0 + 0.01 * (x % 7)) for x in range(20_000)]
    points[7777], points[12_345], points[15_000] = (7777.0, 90.0), (12_345.0, -4.0), (15_000.0, None)
    thinned = thin(points)
    assert len(thinned) <= 3 * BINS + 2 and set(thinned) <= set(points)
    assert {points[0], points[-1], points[7777], points[12_345], points[15_000]} <= set(thinned)
    assert [x for x, _ in thinned] == sorted(x for x, _ in thinned)


def test_few_points_are_kept_as_they_are():
    points = [(0.0, 1.0), (1.0, None), (1.0, 2.0)]
    assert thin(points) == points and thin([]) == []


def test_means_are_of_each_part_and_leave_out_what_has_no_value():
    points = [(0.0, 1.0), (1.0, 3.0), (2.0, None), (3.0, None), (6.0, 5.0), (7.0, None), (8.0, 7.0)]
    assert means(points, bins=4) == [(0.5, 2.0), (2.5, None), (7.0, 6.0)]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 1, [0, 0.25, 0.5, 0.75, 1]), (0.42, 1.4, [0.25, 0.5, 0.75, 1, 1.25, 1.5]), (0, 203_460, [0, 1e5, 2e5, 3e5]),
     (-3, 3, [-4, -2, 0, 2, 4])],
)  # fmt: skip
def test_ticks_are_round_and_enclose(low, high, expected):
    assert ticks(low, high) == expected


@given(finite, finite)
def test_ticks_enclose_any_range(a, b):
    low, high = min(a, b), max(a, b)
    found = ticks(low, high)
    margin = 1e-6 * max(abs(low), abs(high))
    assert 2 <= len(found) <= 8 and found == sorted(set(found)) and found[0] <= low + margin and found[-1] >= high - margin


@given(st.floats(-100, 100), st.floats(0.7, 200))
def test_log_ticks_enclose_any_range(low, length):
    found = log_ticks(low, low + length)
    assert 2 <= len(found) <= 9 and found == sorted(set(found)) and found[0] <= low + 1e-9 and found[-1] >= low + length - 1e-9


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.42, "0.42"), (1.5e-4, "0.00015"), (1.5e-5, "1.5e-5"),
     (5000, "5000"), (250_000, "250k"), (1_250_000, "1.25M"),
     (-0.5, "-0.5"), (2e20, "2e20"), (100, "100")],
)  # fmt: skip
def test_labels_are_short(value, text):
    assert label(value) == text


def test_positions_are_those_of_the_values():
    d = path_of(parse(figure("loss", "Loss", [(0, 1.0), (50, 3.0), (100, 2.0)])))
    assert d == "M0.00 1000.00L500.00 0.00L1000.00 500.00"
    assert Scale(0.0, 2.0, log=True).percent(10.0) == pytest.approx(50.0)


def test_a_wide_range_of_positive_values_is_drawn_logarithmically():
    wide = figure("loss", "Loss", [(0, 100.0), (1, 10.0), (2, 1.0)])
    assert 'data-log="1"' in wide and path_of(parse(wide)) == "M0.00 0.00L500.00 500.00L1000.00 1000.00"
    assert 'data-log=""' in figure("loss", "Loss", [(0, 3.0), (1, 1.0)])
    assert 'data-log=""' in figure("lr", "lr", [(0, 100.0), (1, 1.0)], from_zero=True)
    assert 'data-log=""' in figure("x", "x", [(0, 100.0), (1, 0.0)])


def test_a_value_that_is_none_breaks_the_line_and_is_marked():
    svg = figure("loss", "Loss", [(0, 1.0), (1, 1.0), (2, None), (3, 2.0), (4, None), (5, 2.0), (6, 1.0)])
    assert len(re.findall("M", path_of(parse(svg)))) == 3 and svg.count('class="gap"') == 2
    assert "2 of 7 measurements without a finite value" in svg


def test_restarts_are_lines_at_their_step_and_only_a_few_are_named():
    points = [(float(x), 1.0) for x in range(101)]
    svg = figure("loss", "Loss", points, marks=[(25, "2"), (75, "3"), (999, "4")])
    lines = [e for e in parse(svg).iter("line") if e.get("class") == "mark"]
    assert [e.get("x1") for e in lines] == ["25.00%", "75.00%"] and ">3</text>" in svg
    many = figure("loss", "Loss", points, marks=[(x / 10, f"n{x}") for x in range(1000)])
    assert 10 < many.count('class="mark"') < 100 and "n7" not in many


def test_a_figure_says_in_words_what_it_shows_and_escapes_all_of_it():
    svg = figure("loss", '<Loss> & "more"', [(10, 1.5), (20, 0.5)], unit="<b>", x_name="step'")
    element = parse(svg)
    (image,) = [e for e in element.iter("svg") if e.get("role") == "img"]
    described = {e.get("id"): "".join(e.itertext()) for e in image if e.tag in ("title", "desc")}
    assert image.get("aria-labelledby").split() == list(described)
    assert described["loss-title"].startswith('<Loss> & "more" by') and "least 0.5<b> at step' 20" in described["loss-desc"]


def test_thousands_of_points_make_a_small_figure():
    points = [(float(x), math.sin(x / 1000) + 2) for x in range(100_000)]
    svg = figure("loss", "Loss", points)
    assert len(svg) < 40_000 and path_of(parse(svg), "range").count("L") > BINS


def test_without_a_value_there_is_no_figure():
    assert figure("loss", "Loss", []) == "" and figure("loss", "Loss", [(1, None)]) == ""


@settings(deadline=None, max_examples=300)
@given(st.lists(st.tuples(st.floats(0, 1e12), st.none() | finite), min_size=1, max_size=30), st.booleans())
def test_any_values_make_a_figure_that_parses(points, from_zero):
    points.sort(key=lambda p: p[0])
    svg = figure("loss", "Loss", points, from_zero=from_zero, dots=[(x, y) for x, y in points if y is not None])
    assert (svg == "") == all(y is None for _, y in points)
    if svg:
        numbers = re.findall(r"-?[\d.]+", path_of(parse(svg)))
        assert numbers and all(-1 <= float(n) <= 1001 for n in numbers) and "nan" not in svg and ">inf" not in svg
