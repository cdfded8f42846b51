"""The processes of one run: rank, world size, and what they exchange on the CPU. The model does not know of it."""

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout

from fastmae.errors import InputError, LostProcessError

SLACK = 60.0
"""Seconds that a collective waits longer than the run's own watch, whose message is better."""


@dataclass(frozen=True)
class World:
    """Rank and world size of this process."""

    rank: int
    size: int
    device: torch.device
    control: dist.ProcessGroup | None = None
    """A gloo group for votes and messages, so that these never wait for a GPU; None in a run of one."""
    background: dist.ProcessGroup | None = None
    """Another such group, for the thread that writes checkpoints."""
    local_size: int = 1
    """Processes on this machine."""
    address: str | None = None
    """Where rank 0 can be reached; None in a run of one."""
    machine: dist.ProcessGroup | None = None
    """The processes of this machine, on the CPU; None unless several machines have several each."""
    leaders: dist.ProcessGroup | None = None
    """The first processes of all machines; None on others."""
    local_rank: int = 0
    """This process's number on its machine."""

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes files and prints to the console."""
        return self.rank == 0

    def mean(self, x: torch.Tensor) -> torch.Tensor:
        """The mean of ``x`` over all processes."""
        if self.size == 1:
            return x
        total = x.clone()
        with _naming_the_lost():
            dist.all_reduce(total)
        return total / self.size

    def any(self, *flags: bool) -> list[bool]:
        """For each of ``flags``, whether it is true on any process."""
        if self.size == 1:
            return list(flags)
        votes = torch.tensor([int(flag) for flag in flags])
        with _naming_the_lost():
            if self.machine is None:
                dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=self.control)
            else:  # gloo sums in a ring: 2 (512 - 1) hops in a row, or, machine by machine, 2 (64 - 1) between machines
                first = self.rank - self.rank % self.local_size
                dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=self.machine)
                if self.leaders is not None:
                    dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=self.leaders)
                dist.broadcast(votes, src=first, group=self.machine)
        return [bool(vote) for vote in votes.tolist()]

    def gather(self, lines: list) -> list:
        """The ``lines`` of all processes, in the order of their ranks, on every process."""
        if self.size == 1:
            return lines
        everyone: list[list | None] = [None] * self.size
        with _naming_the_lost():
            dist.all_gather_object(everyone, lines, group=self.control)
        return [line for theirs in everyone for line in theirs]

    def from_main(self, text: str | None) -> str | None:
        """Rank 0's ``text``, on every process."""
        if self.size == 1:
            return text
        box = [text]
        with _naming_the_lost():
            dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def by_main(self, work: Callable[[], str | None]) -> str | None:
        """The result of ``work`` on rank 0. Its InputError or OSError is an InputError on the other ranks as well, so that none
        waits for a lost one."""
        given, wrong, failed = None, None, None
        if self.is_main:
            try:
                given = work()
            except InputError as error:
                wrong, failed = error, str(error)
            except OSError as error:
                wrong, failed = error, f"{error.filename or 'rank 0'}: {error.strerror or error}"
        failed = self.from_main(failed)
        if failed is not None:
            raise wrong or InputError(failed)
        return self.from_main(given)

    def barrier(self) -> None:
        """Wait for all processes."""
        self.any(False)  # gloo's own barrier would put a tensor on the GPU

    def set_timeout(self, seconds: float, groups: Iterable[dist.ProcessGroup] = ()) -> None:
        """How long collectives, those of other ``groups`` too, may take from now on, before they fail."""
        ours = (dist.group.WORLD, self.control, self.background, self.machine, self.leaders)
        for group in (*ours, *groups) if self.size > 1 else ():
            if group is not None:
                _set_pg_timeout(timedelta(seconds=seconds + SLACK), group)


def trains_on_gpu(device: str) -> bool:
    """Whether ``device``, one of auto, cpu and cuda, stands for a GPU on this machine. Opens none.

    Raises InputError if one is asked for and none is there.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise InputError(f"device must be auto, cpu or cuda, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("device cuda was asked for, but torch sees no CUDA device; `fastmae doctor` shows why")
    return torch.cuda.is_available() if device == "auto" else device == "cuda"


def is_of_collective(error: RuntimeError) -> bool:
    """Whether ``error`` is what a collective raises when a process is lost or does not answer."""
    pattern = "gloo|nccl|connection|socket|peer|timed out|process group"
    return isinstance(error, dist.DistError) or bool(re.search(pattern, str(error), re.IGNORECASE))


@contextmanager
def _naming_the_lost() -> Iterator[None]:
    """Turns what torch raises when another process is lost into LostProcessError."""
    try:
        yield
    except RuntimeError as error:
        if not is_of_collective(error):
            raise
        reason = str(error).partition("\n")[0]
        raise LostProcessError(f"another process of this run does not answer: {reason}") from error
