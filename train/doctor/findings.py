"""What the preflight check finds: lines that rank 0 prints at once, and how many of them are errors."""

import sys
from collections.abc import Hashable, Iterable, Mapping

from fastmae.train.distributed.world import World


class Report:
    """The report. Each process makes the same one from what was gathered; rank 0 prints it."""

    def __init__(self, world: World):
        self.world = world
        self.errors = self.warnings = 0

    def line(self, text: str) -> None:
        """Print a finding that is no problem."""
        if self.world.is_main:
            print(text)
            sys.stdout.flush()  # what comes next may hang

    def error(self, text: str) -> None:
        """Print what would make a run fail, and what to do."""
        self.errors += 1
        self.line(f"error: {text}")

    def warning(self, text: str) -> None:
        """Print what may make a run slower, or its results harder to read, and what to do."""
        self.warnings += 1
        self.line(f"warning: {text}")


def name_ranks(ranks: Iterable[int]) -> str:
    """ "rank 3", or "ranks 0-2, 5"."""
    spans: list[list[int]] = []
    for rank in sorted(ranks):
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    text = ", ".join(f"{first}-{last}" if first < last else f"{first}" for first, last in spans)
    return f"rank {text}" if len(spans) == 1 and spans[0][0] == spans[0][1] else f"ranks {text}"


def group_ranks(values: Mapping[int, Hashable]) -> dict[Hashable, list[int]]:
    """The ranks of each value, the value of most ranks first."""
    found: dict[Hashable, list[int]] = {}
    for rank, value in sorted(values.items()):
        found.setdefault(value, []).append(rank)
    return dict(sorted(found.items(), key=lambda item: -len(item[1])))


def describe_groups(values: Mapping[int, Hashable]) -> str:
    """ "2.13.0 on ranks 0-2; 2.11.0 on rank 3"."""
    return "; ".join(f"{value} on {name_ranks(ranks)}" for value, ranks in group_ranks(values).items())
