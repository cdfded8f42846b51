"""Ranks in words."""

import pytest

from fastmae.train.doctor.findings import describe_groups, name_ranks


@pytest.mark.parametrize(
    ("ranks", "text"), [([3], "rank 3"), ([2, 0, 1], "ranks 0-2"), ([0, 1, 2, 5, 7, 8], "ranks 0-2, 5, 7-8")]
)
def test_ranks_are_named_in_spans(ranks, text):
    assert name_ranks(ranks) == text


def test_values_are_told_with_their_ranks_the_usual_one_first():
    assert describe_groups({0: "b", 1: "a", 2: "a"}) == "a on ranks 1-2; b on rank 0"
