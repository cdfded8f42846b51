"""How far the machines' clocks differ: rank 0 asks the first process of each for its time, as NTP does.

    offset = theirs - (sent + received) / 2,   uncertain by (received - sent) / 2

The fastest of several answers counts. Source: RFC 5905, section 8.
"""

import time
from typing import NamedTuple

import torch
import torch.distributed as dist

from fastmae.train.distributed.world import World
from fastmae.train.doctor.findings import Report
from fastmae.train.doctor.inventory import Inventory

_QUESTIONS = 8
_APART = 0.5  # seconds from which on log lines of several machines cannot be put in order


class Offset(NamedTuple):
    """How far the clock of a machine is ahead of rank 0's, seconds."""

    rank: int
    seconds: float
    uncertainty: float


def compare_clocks(report: Report, world: World, machines: list[list[Inventory]]) -> None:
    """Report how far the machines' clocks differ."""
    offsets = clock_offsets(world, [machine[0].rank for machine in machines])
    for offset in offsets:
        if abs(offset.seconds) - offset.uncertainty > _APART:
            host = next(machine[0].host for machine in machines if machine[0].rank == offset.rank)
            report.warning(
                f"clock of {host} (rank {offset.rank}): {offset.seconds:+.3f} s from rank 0's, +- {offset.uncertainty:.3f} s; "
                "start an NTP client (chronyd) there"
            )
    if offsets:
        furthest = max(offsets, key=lambda offset: abs(offset.seconds))
        report.line(f"clocks: at most {furthest.seconds:+.4f} s from rank 0's, +- {furthest.uncertainty:.4f} s")


def clock_offsets(world: World, leaders: list[int]) -> list[Offset]:
    """The offset of each of ``leaders``, one rank of each machine; all processes call this, and get the same answer."""
    found: list[Offset] = []
    for leader in (rank for rank in leaders if rank != 0):
        if world.is_main:
            found.append(_ask(world, leader))
        elif world.rank == leader:
            _answer(world)
    return world.gather(found)


def now() -> float:
    """This machine's time, seconds since 1970."""
    return time.time()


def _ask(world: World, leader: int) -> Offset:
    answers = []
    for _ in range(_QUESTIONS):
        theirs, sent = torch.zeros(1, dtype=torch.float64), now()
        dist.send(theirs, dst=leader, group=world.control)
        dist.recv(theirs, src=leader, group=world.control)
        received = now()
        answers.append(Offset(leader, theirs.item() - (sent + received) / 2, (received - sent) / 2))
    return min(answers, key=lambda answer: answer.uncertainty)


def _answer(world: World) -> None:
    for _ in range(_QUESTIONS):
        asked = torch.zeros(1, dtype=torch.float64)
        dist.recv(asked, src=0, group=world.control)
        dist.send(torch.tensor([now()], dtype=torch.float64), dst=0, group=world.control)
