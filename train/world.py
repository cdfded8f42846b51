"""The processes of one run: who am I, how many are we, and the words that pass between us. The model knows nothing of it."""

import os
import re
import resource
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout

from fastmae.errors import InputError, LostProcessError
from fastmae.train.environment import Place, read_place
from fastmae.train.meeting import open_store

_SLACK = 60.0  # seconds that a collective waits longer than the run's own watch, which says more


@dataclass(frozen=True)
class World:
    """This process's place among the processes of a run."""

    rank: int
    size: int
    device: torch.device
    control: dist.ProcessGroup | None = None
    """A group on the CPU for words between the processes, which so never wait for a GPU; None in a run of one."""
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
        """Whether this process writes files and talks to the console."""
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
        """The main process's ``text``, on every process."""
        if self.size == 1:
            return text
        box = [text]
        with _naming_the_lost():
            dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def by_main(self, work: Callable[[], str | None]) -> str | None:
        """What ``work`` gives on the main process. Its InputError is raised on every one, so that none waits for one gone."""
        given, wrong = None, None
        if self.is_main:
            try:
                given = work()
            except InputError as error:
                wrong = error
        failed = self.from_main(str(wrong) if wrong else None)
        if failed is not None:
            raise wrong or InputError(failed)
        return self.from_main(given)

    def barrier(self) -> None:
        """Wait for all processes."""
        self.any(False)  # gloo's own barrier would put a tensor on the GPU

    def set_timeout(self, seconds: float, groups: Iterable[dist.ProcessGroup] = ()) -> None:
        """How long a step's collectives, those of other ``groups`` too, may take from now on, before they fail."""
        for group in (dist.group.WORLD, self.control, self.machine, self.leaders, *groups) if self.size > 1 else ():
            if group is not None:
                _set_pg_timeout(timedelta(seconds=seconds + _SLACK), group)


def join_world(device: str, timeout: float = 1800.0) -> World:
    """Read the launcher's environment and join its group: NCCL on GPUs, gloo on the CPU.

    ``device``: auto, cpu or cuda. ``timeout``: seconds that collectives may take until ``World.set_timeout``. Raises
    InputError if a GPU is asked for and none is there, or if the environment contradicts itself.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise InputError(f"device must be auto, cpu or cuda, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("device cuda was asked for, but torch sees no CUDA device; `fastmae doctor` tells more")
    on_gpu = torch.cuda.is_available() if device == "auto" else device == "cuda"
    place = read_place()
    at = torch.device("cuda", _gpu(place)) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(at)
    if place.size == 1:
        return World(0, 1, at)
    _make_room()
    patience = timedelta(seconds=timeout + _SLACK)
    if not dist.is_initialized():
        try:
            dist.init_process_group(
                "nccl" if on_gpu else "gloo",
                store=open_store(place, patience),
                rank=place.rank,
                world_size=place.size,
                timeout=patience,
                device_id=at if on_gpu else None,
            )
        except dist.DistError as error:
            reason = str(error).partition("\n")[0]
            raise LostProcessError(f"not all of the {place.size} processes of this run have met: {reason}") from error
    options = {"backend": "gloo", "timeout": patience}
    control, background = (dist.new_group(**options) for _ in range(2))
    machine, leaders = machine_groups(place.size, place.local_size, **options)
    return World(place.rank, place.size, at, control, background, place.local_size, place.address, machine, leaders,
                 place.local_rank)  # fmt: skip


def machine_groups(size: int, local_size: int, **options) -> tuple[dist.ProcessGroup | None, dist.ProcessGroup | None]:
    """The groups ``World.machine`` and ``World.leaders`` of a run of ``size``; ``options`` as of ``dist.new_group``."""
    if not 1 < local_size < size or size % local_size:
        return None, None
    firsts = range(0, size, local_size)
    machine, _ = dist.new_subgroups_by_enumeration([[*range(r, r + local_size)] for r in firsts], **options)
    leaders = dist.new_group([*firsts], **options)
    return machine, leaders if isinstance(leaders, dist.ProcessGroup) else None


def _make_room() -> None:
    """Let this process open as many files as it may: each gloo group takes a connection to every other process."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    network = os.environ.get("NCCL_SOCKET_IFNAME", "")
    if network and not set("=^:") & set(network):  # a plain name, which gloo understands as well
        os.environ.setdefault("GLOO_SOCKET_IFNAME", network.partition(",")[0])


def in_group() -> bool:
    """Whether this process has joined others, and not left them."""
    return dist.is_initialized()


def leave_world() -> None:
    """Leave the group, if one was joined."""
    if in_group():
        dist.destroy_process_group()


def _gpu(place: Place) -> int:
    """The number of this process's GPU. A launcher that shows each process one GPU only calls it the first."""
    visible = torch.cuda.device_count()
    if visible == 1 and place.local_size > 1 and place.launcher != "torchrun":
        return 0
    if place.local_rank >= visible:
        raise InputError(f"process {place.local_rank} of this machine has no GPU: it has {visible}; start fewer processes")
    return place.local_rank


def is_of_collective(error: RuntimeError) -> bool:
    """Whether ``error`` is what a collective raises when a process is gone or silent."""
    words = "gloo|nccl|connection|socket|peer|timed out|process group"
    return isinstance(error, dist.DistError) or bool(re.search(words, str(error), re.IGNORECASE))


@contextmanager
def _naming_the_lost() -> Iterator[None]:
    """Turns what torch raises when another process is gone into LostProcessError."""
    try:
        yield
    except RuntimeError as error:
        if not is_of_collective(error):
            raise
        reason = str(error).partition("\n")[0]
        raise LostProcessError(f"another process of this run does not answer: {reason}") from error
