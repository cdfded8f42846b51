"""The processes of one run: rank, world size, and what they exchange on the CPU. The model knows nothing of it."""

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
from fastmae.train.console import report
from fastmae.train.distributed.background import Background, has_abandoned
from fastmae.train.distributed.groups import make_groups
from fastmae.train.distributed.launcher import RankInfo, read_launcher
from fastmae.train.distributed.nccl import set_nccl_defaults
from fastmae.train.distributed.peers import Peer, gpus_of, locals_of, this_peer
from fastmae.train.distributed.rendezvous import ConnectAbort, Rendezvous

_FIRST_REPORT = 30.0  # seconds
_SLACK = 60.0  # seconds that a collective waits longer than the run's own watch, whose message is better


@dataclass(frozen=True)
class World:
    """Rank and world size of this process."""

    rank: int
    size: int
    device: torch.device
    control: dist.ProcessGroup | None = None
    """A gloo group for votes and texts, so that these never wait for a GPU; None in a run of one."""
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
        """What ``work`` gives on the main process. Its InputError or OSError, an InputError on the others, ends all ranks,
        so that none waits for a lost one."""
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
                _set_pg_timeout(timedelta(seconds=seconds + _SLACK), group)


def join_world(device: str, timeout: float = 1800.0, stopped: Callable[[], str | None] = lambda: None) -> World:
    """Read the launcher's environment and join its group: NCCL on GPUs, gloo on the CPU.

    ``device``: auto, cpu or cuda. ``timeout``: seconds that all processes may take to come, and collectives until
    ``World.set_timeout``. ``stopped``: the name of the signal that asks this process to stop, if any. Raises InputError if
    there is no GPU where one is needed, or environments contradict themselves or each other; LostProcessError if not all
    processes come; KeyboardInterrupt if this one is asked to stop before they have.
    """
    info = read_launcher()
    on_gpu = trains_on_gpu(device)
    if info.size == 1:
        return World(0, 1, _use_gpu(0) if on_gpu else torch.device("cpu"))
    _make_room()
    set_nccl_defaults(timeout, info.is_elastic)
    peer = this_peer(info, torch.cuda.device_count() if on_gpu else 0)
    store, peers, address = _gather_peers(info, peer, timeout, stopped)
    everyone = locals_of(peers)  # what is wrong with one raises on all of them, here and in the next line
    gpus = gpus_of(peers, everyone)
    at = _use_gpu(gpus[info.rank]) if gpus else torch.device("cpu")
    group_timeout = timedelta(seconds=timeout + _SLACK)

    def make() -> tuple[dist.ProcessGroup | None, ...]:
        if on_gpu:
            torch.cuda.set_device(at)  # which is each thread's own
        if store is not None:
            store.set_timeout(group_timeout)
            dist.init_process_group("nccl" if on_gpu else "gloo", store=store, rank=info.rank, world_size=info.size,
                                    timeout=group_timeout, device_id=at if on_gpu else None)  # fmt: skip
        return make_groups(everyone, timeout=group_timeout)

    abort = None if store is None else ConnectAbort(store, peer, address)
    try:
        groups = Background(make).wait(_ConnectWatch(info.rank, "nccl" if on_gpu else "gloo", stopped, abort))
    except BaseException as error:
        reason = str(error).partition("\n")[0]
        if abort is not None:
            abort.leave(reason or type(error).__name__)
        if isinstance(error, dist.DistError):
            raise LostProcessError(f"the {info.size} processes of this run have not joined into a group: {reason}") from error
        raise
    if abort is not None:
        abort.end()
    control, background, machine, leaders = groups
    here = everyone[info.rank]
    return World(info.rank, info.size, at, control, background, here.size, address, machine, leaders, here.rank)


def _gather_peers(info: RankInfo, peer: Peer, timeout: float, stopped: Callable[[], str | None]):
    """The store to make a group with, all processes in order of their ranks, and where rank 0 is reached.

    No store if the calling program has made the group already.
    """
    if dist.is_initialized():
        peers: list[Peer | None] = [None] * info.size
        dist.all_gather_object(peers, peer)
        return None, peers, info.address
    rendezvous = Rendezvous(info, peer, timeout, stopped)
    store, peers = rendezvous.wait()
    return store, peers, rendezvous.address


class _ConnectWatch:
    """Looks at signals, and reports from rank 0, while torch sets up the communication of all processes."""

    def __init__(self, rank: int, backend: str, stopped: Callable[[], str | None], abort: ConnectAbort | None):
        self._rank, self._backend, self._stopped, self._due = rank, backend, stopped, _FIRST_REPORT
        self._abort = abort

    def __call__(self, seconds: float) -> None:
        if name := self._stopped():
            raise KeyboardInterrupt(f"stopped by {name} while {self._backend} was set up")
        if self._abort is not None and self._abort.reason:
            raise LostProcessError(f"{self._abort.reason}; the others end")
        if seconds >= self._due and self._rank == 0:
            self._due *= 2
            variable = "NCCL_DEBUG=INFO" if self._backend == "nccl" else "TORCH_CPP_LOG_LEVEL=INFO"
            report(
                f"all processes have joined; {self._backend} connects them for {seconds:.0f} s; {variable} shows what it does"
            )


def trains_on_gpu(device: str) -> bool:
    """Whether ``device``, one of auto, cpu and cuda, stands for a GPU on this machine. Opens none.

    Raises InputError if one is asked for and none is there.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise InputError(f"device must be auto, cpu or cuda, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("device cuda was asked for, but torch sees no CUDA device; `fastmae doctor` shows why")
    return torch.cuda.is_available() if device == "auto" else device == "cuda"


def _make_room() -> None:
    """Let this process open as many files as it may: each gloo group takes a connection to every other process."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    network = os.environ.get("NCCL_SOCKET_IFNAME", "")
    if network and not set("=^:") & set(network):  # a plain name, which gloo understands as well
        os.environ.setdefault("GLOO_SOCKET_IFNAME", network.partition(",")[0])


def in_group() -> bool:
    """Whether this process has joined others, or was about to, and not left them: threads of torch's may wait for them."""
    return dist.is_initialized() or has_abandoned()


def leave_world() -> None:
    """Leave the group, if one was joined."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _use_gpu(number: int) -> torch.device:
    """That GPU, made this process's current one."""
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


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
