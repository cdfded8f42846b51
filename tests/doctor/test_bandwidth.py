"""Bandwidth of all-reduces: which groups are measured together, and what of a link is told."""

import pytest

from fastmae.train.doctor.bandwidth import Rate, kinds_of


@pytest.mark.parametrize(
    ("machines", "expected"),
    [
        ([[0]], {}),
        ([[0, 1]], {"within machines": [[0, 1]]}),
        ([[0], [1], [2]], {"between machines": [[0, 1, 2]]}),
        ([[0, 1], [2, 3]], {"within machines": [[0, 1], [2, 3]], "between machines": [[0, 2], [1, 3]],
                            "over all ranks": [[0, 1, 2, 3]]}),
        ([[0, 1], [2]], {"within machines": [[0, 1]], "between machines": [[0, 2]], "over all ranks": [[0, 1, 2]]}),
        ([[0, 2], [1, 3]], {"within machines": [[0, 2], [1, 3]], "between machines": [[0, 1], [2, 3]],
                            "over all ranks": [[0, 1, 2, 3]]}),
    ],
)  # fmt: skip
def test_groups_that_are_measured_together_share_no_rank(machines, expected):
    assert kinds_of(machines) == expected


def test_bus_bandwidth_is_what_a_link_must_carry():
    rate = Rate(ranks=tuple(range(8)), bytes=2_000_000_000, seconds=0.1)
    assert rate.algorithm == 20.0 and rate.bus == pytest.approx(20.0 * 2 * 7 / 8)
