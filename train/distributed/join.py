"""Joins the processes of a run: reads the launcher's variables, waits at the rendezvous, and makes the process groups.

Every rank makes the same number of collective calls for the groups. With a device bound to the default group, as NCCL's is,
torch (2.11, 2.13) splits its communicator, a collective call, on each rank that is not a member of a group that it takes part
in making, gloo's too. So each group here holds all ranks, or is made by its members alone.
"""

import os
import resource
import threading
import time
from collections.abc import Callable, MutableMapping, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from fastmae.errors import LostProcessError
from fastmae.train.console import report
from fastmae.train.distributed.background import Background, has_abandoned
from fastmae.train.distributed.launcher import RankInfo, read_launcher
from fastmae.train.distributed.peers import Local, Peer, gpus_of, locals_of, this_peer
from fastmae.train.distributed.rendezvous import FIRST_REPORT, LINGER, Rendezvous
from fastmae.train.distributed.store import ANSWER
from fastmae.train.distributed.world import SLACK, World, trains_on_gpu

_LEFT = "fastmae/left"  # key of the store
_LOOK = 1.0  # seconds between two looks at whether a process has left
_NAMED_WITHIN = 120.0  # seconds in which the watch has named a lost process, at the start as well
_MARGIN = 60.0  # seconds that torch waits longer
_ERROR_WAITS = 4  # of TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC between an error and the end
_LONGEST = 86400.0  # seconds; torch keeps the milliseconds in 32 bits
_HANDLING = "TORCH_NCCL_ASYNC_ERROR_HANDLING"


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
    group_timeout = timedelta(seconds=timeout + SLACK)

    def make() -> tuple[dist.ProcessGroup | None, ...]:
        if on_gpu:
            torch.cuda.set_device(at)  # which is each thread's own
        if store is not None:
            store.set_timeout(group_timeout)
            dist.init_process_group("nccl" if on_gpu else "gloo", store=store, rank=info.rank, world_size=info.size,
                                    timeout=group_timeout, device_id=at if on_gpu else None)  # fmt: skip
        return make_groups(everyone, timeout=group_timeout)

    abort = None if store is None else _ConnectAbort(store, peer, address)
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


def in_group() -> bool:
    """Whether this process has joined others, or was about to, and not left them: threads of torch's may wait for them."""
    return dist.is_initialized() or has_abandoned()


def leave_world() -> None:
    """Leave the group, if one was joined."""
    if dist.is_initialized():
        dist.destroy_process_group()


def make_groups(everyone: Sequence[Local], backend: str = "gloo", **options) -> tuple[dist.ProcessGroup | None, ...]:
    """The groups ``control``, ``background``, ``machine`` and ``leaders`` of a ``World`` whose ranks are ``everyone``.

    ``options`` as of ``dist.new_group``. The first process of a machine makes its machine's group before that of the leaders.
    """
    control, background = (dist.new_group(backend=backend, **options) for _ in range(2))
    size = everyone[0].size
    # Of machines that differ in size, or whose ranks do not follow each other, all ranks know that there are no such groups.
    is_even = all(local == Local(rank % size, size) for rank, local in enumerate(everyone))
    machine, leaders = machine_groups(len(everyone), size if is_even else 1, backend=backend, **options)
    return control, background, machine, leaders


def machine_groups(size: int, local_size: int, **options) -> tuple[dist.ProcessGroup | None, dist.ProcessGroup | None]:
    """The groups ``World.machine`` and ``World.leaders`` of a run of ``size``; ``options`` as of ``dist.new_group``."""
    if not 1 < local_size < size or size % local_size:
        return None, None
    rank = dist.get_rank()
    first = rank - rank % local_size
    # A group that its members make by themselves is named after its ranks and how many groups they have made before: a group
    # of one, on those that are no leaders, keeps that number the same everywhere.
    theirs = range(0, size, local_size) if rank == first else [rank]
    machine, leaders = (
        dist.new_group([*ranks], use_local_synchronization=True, **options)
        for ranks in (range(first, first + local_size), theirs)
    )
    return machine, leaders if rank == first else None


def set_nccl_defaults(timeout: float, is_elastic: bool, environ: MutableMapping[str, str] = os.environ) -> None:
    """Delay, before the groups are made, what NCCL's process group does when a process is lost, so that the watch names it
    first. Variables that the user has set stay.

    ``timeout``: the watch's longest, seconds; ``is_elastic``: torchrun's agent has started this process, and set its own
    default. NCCL's watchdog thread aborts the process (exit code 134) four times TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC after an
    error of the communicator, 60 s by default; its heartbeat monitor does when that thread has been stuck for twice
    TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC, 16 min. torchrun sets TORCH_NCCL_ASYNC_ERROR_HANDLING to 1: the communicator is aborted
    first, and the main thread continues with half-reduced gradients until the process ends; with 3, torch's default, kernels
    wait. Source: torch/csrc/distributed/c10d/ProcessGroupNCCL.hpp (torch 2.13) and .cpp (Watchdog, HeartbeatMonitor).
    """
    dump = (_NAMED_WITHIN + _MARGIN) / _ERROR_WAITS
    environ.setdefault("TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC", str(round(1000 * dump)))
    environ.setdefault("TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC", str(round(min(timeout + _MARGIN, _LONGEST))))
    if is_elastic and environ.get(_HANDLING) == "1":  # torchrun's, not the user's
        environ[_HANDLING] = "3"


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


class _ConnectAbort:
    """Aborts, on all processes, the wait for torch to connect them once one has failed: a key of the store that each reads in a
    thread, by a connection of its own."""

    def __init__(self, store: dist.TCPStore, peer: Peer, address: str):
        self.reason: str | None = None
        """Which process has failed, and why; None if none has."""
        self._peer, self._address, self._port = peer, address, store.port
        self._own, self._is_over = "", threading.Event()
        self._background = Background(self._run)

    def leave(self, reason: str) -> None:
        """This process ends, by a signal or an error: publishes it to the others."""
        self._own = f"rank {self._peer.rank} on {self._peer.host} has left while torch connected all ranks, {reason}"
        self.end()
        self._background.is_over(LINGER)
        if self._peer.rank == 0:
            time.sleep(LINGER)

    def end(self) -> None:
        """All are connected."""
        self._is_over.set()

    def _run(self) -> None:
        try:
            store = dist.TCPStore(self._address, self._port, is_master=False, timeout=ANSWER, wait_for_workers=False)
            while self.reason is None and not self._is_over.wait(_LOOK):
                self.reason = store.get(_LEFT).decode() if store.check([_LEFT]) else None
            if self._own:
                store.compare_set(_LEFT, "", self._own)  # the first one counts
        except dist.DistError:
            self.reason = "rank 0 is lost"


class _ConnectWatch:
    """Looks at signals, and reports from rank 0, while torch sets up the communication of all processes."""

    def __init__(self, rank: int, backend: str, stopped: Callable[[], str | None], abort: _ConnectAbort | None):
        self._rank, self._backend, self._stopped, self._due = rank, backend, stopped, FIRST_REPORT
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


def _make_room() -> None:
    """Let this process open as many files as it may: each gloo group takes a connection to every other process."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    network = os.environ.get("NCCL_SOCKET_IFNAME", "")
    if network and not set("=^:") & set(network):  # a plain name, which gloo understands as well
        os.environ.setdefault("GLOO_SOCKET_IFNAME", network.partition(",")[0])


def _use_gpu(number: int) -> torch.device:
    """That GPU, made this process's current one."""
    torch.cuda.set_device(number)
    return torch.device("cuda", number)
