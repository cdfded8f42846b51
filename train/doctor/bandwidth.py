"""How fast all-reduces are: within each machine, between machines, and over all ranks.

    algorithm bandwidth = bytes / seconds,   bus bandwidth = algorithm bandwidth * 2 (n - 1) / n

for n ranks: the least rate of each link. Source: nccl-tests, doc/PERFORMANCE.md. All groups of a kind run at the same
time, as in a training step: within machines, one group a machine; between them, one group for each number on a machine.
"""

import math
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from fastmae.train.distributed.world import World
from fastmae.train.doctor.findings import Report, name_ranks
from fastmae.train.doctor.inventory import Inventory

_BYTES = {"cuda": 256 << 20, "cpu": 16 << 20}
_ROUNDS, _WARM_UPS = 10, 2
_SLOW = 0.5  # of the median rate of groups of one kind
_PATIENCE = 60.0  # seconds for all rounds of one kind, the set-up of NCCL included


@dataclass(frozen=True, kw_only=True)
class Rate:
    """How fast the all-reduce of one group was, or why it failed."""

    ranks: tuple[int, ...]
    bytes: int
    seconds: float
    """Median over the rounds."""
    error: str | None = None

    @property
    def algorithm(self) -> float:
        """GB/s."""
        return self.bytes / self.seconds / 1e9

    @property
    def bus(self) -> float:
        """GB/s."""
        return self.algorithm * 2 * (len(self.ranks) - 1) / len(self.ranks)


def check_rates(report: Report, world: World, machines: list[list[Inventory]], device: torch.device) -> bool:
    """Measure and report all-reduces; whether they work."""
    network = "NCCL" if device.type == "cuda" else "gloo"
    for kind, groups in kinds_of([[one.rank for one in machine] for machine in machines]).items() if world.size > 1 else ():
        rates = measure_rates(world, device, groups)
        failed = [rate for rate in rates if rate.error]
        for rate in failed:
            debug = "NCCL_DEBUG=INFO shows why" if network == "NCCL" else "check the network between the machines"
            report.error(f"all-reduce {kind} ({network}) fails on {name_ranks(rate.ranks)}: {rate.error}; {debug}")
        if failed:
            return False
        report.line(_describe_rates(kind, network, rates))
        median = statistics.median(rate.bus for rate in rates)
        for rate in rates:
            if rate.bus < _SLOW * median:
                report.warning(
                    f"all-reduce {kind}: {name_ranks(rate.ranks)} at {rate.bus:.2f} GB/s, the median is {median:.2f}; look for "
                    "a slow link or GPU there"
                )
    return True


def kinds_of(machines: Sequence[Sequence[int]]) -> dict[str, list[list[int]]]:
    """The groups that are measured, by kind, each a list of ranks; groups of one rank are skipped."""
    within = [[*machine] for machine in machines]
    most = max(map(len, machines))
    between = [[machine[number] for machine in machines if number < len(machine)] for number in range(most)]
    everyone = sorted(rank for machine in machines for rank in machine)
    kinds = {"within machines": within, "between machines": between, "over all ranks": [everyone]}
    if len(machines) == 1:
        del kinds["over all ranks"]  # the same as within the one machine
    elif most == 1:
        del kinds["over all ranks"]  # the same as between machines
    groups = {kind: [ranks for ranks in found if len(ranks) > 1] for kind, found in kinds.items()}
    return {kind: found for kind, found in groups.items() if found}


def measure_rates(world: World, device: torch.device, groups: list[list[int]]) -> list[Rate]:
    """The rates of ``groups``, which share no rank. All processes call this and get the same answer."""
    size = _BYTES[device.type]
    ranks = next((tuple(found) for found in groups if world.rank in found), None)
    seconds, error = _within(_PATIENCE, lambda: _measure(world, groups, device, size))
    mine = [Rate(ranks=ranks, bytes=size, seconds=seconds or math.nan, error=error)] if ranks else []
    rates: dict[tuple[int, ...], Rate] = {}
    for rate in world.gather(mine):  # of a group the slowest rank's, or an error
        known = rates.get(rate.ranks)
        if known is None or (known.error is None and (rate.error or rate.seconds > known.seconds)):
            rates[rate.ranks] = rate
    return [*rates.values()]


def _describe_rates(kind: str, network: str, rates: list[Rate]) -> str:
    slowest = min(rates, key=lambda rate: rate.bus)
    which = f", the slowest of {len(rates)} groups at once ({name_ranks(slowest.ranks)})" if len(rates) > 1 else ""
    return (
        f"all-reduce {kind} ({network}, {slowest.bytes >> 20} MiB, {len(slowest.ranks)} ranks, median): "
        f"{slowest.algorithm:.2f} GB/s, bus {slowest.bus:.2f} GB/s{which}"
    )


def _measure(world: World, groups: list[list[int]], device: torch.device, size: int) -> float:
    """Median seconds of an all-reduce of ``size`` bytes in this rank's group; 0 if it is in none."""
    network = "nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)  # each thread has its own
    # Every rank makes all of them: a group that its members make alone gets its name from how many groups each has, and they
    # wait for each other under different names where one has more (torch 2.13).
    made = [dist.new_group(ranks, backend=network, timeout=timedelta(seconds=2 * _PATIENCE)) for ranks in groups]
    own = next((group for group, ranks in zip(made, groups, strict=True) if world.rank in ranks), None)
    if own is None:
        return 0.0
    values = torch.zeros(size // 4, device=device)
    seconds = []
    for _ in range(_WARM_UPS + _ROUNDS):
        began = time.perf_counter()
        dist.all_reduce(values, group=own)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[_WARM_UPS:])


def _within(seconds: float, work: Callable[[], float]) -> tuple[float | None, str | None]:
    """The result of ``work``, or why there is none: NCCL waits in C for a peer that it cannot reach, and handles no signal."""
    found: list[float] = []
    errors: list[str] = []

    def run() -> None:
        try:
            found.append(work())
        except Exception as error:  # a probe: whatever a driver or a network raises is the reason
            errors.append(f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")

    thread = threading.Thread(target=run, name="all-reduce", daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        return None, f"not done after {seconds:.0f} s"
    return (found[0], None) if found else (None, errors[0])
