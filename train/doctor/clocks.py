"""How far the machines' clocks differ: rank 0 asks the first process of each for its time, as NTP does.

    offset = theirs - (sent + received) / 2,   uncertain by (received - sent) / 2

Of several questions the one that was answered fastest counts. Source: RFC 5905, section 8.
"""

import time
from typing import NamedTuple

import torch
import torch.distributed as dist

from fastmae.train.distributed.world import World

_QUESTIONS = 8


class Offset(NamedTuple):
    """How far the clock of a machine is ahead of rank 0's, seconds."""

    rank: int
    seconds: float
    uncertainty: float


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
