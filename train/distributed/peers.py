"""The processes of a run: what each publishes about itself at the rendezvous, and how many of them share a machine.

A machine is a kernel (its boot id) and a host name. Several containers may share both, so where that does not fit the local
ranks, or none are given, a mount namespace counts as a machine of its own: its processes see the same files and devices.
"""

import os
import socket
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from fastmae.errors import InputError
from fastmae.train.distributed.launcher import RankInfo

_MOST_NAMED = 8


class Local(NamedTuple):
    """A process among those of its machine."""

    rank: int
    size: int


@dataclass(frozen=True, kw_only=True)
class Peer:
    """One process of a run, as published at the rendezvous."""

    rank: int
    size: int
    """World size, by its own environment."""
    local_rank: int | None
    local_size: int | None
    """None if the launcher does not give it, like ``local_rank``."""
    launcher: str
    gpus: int
    """GPUs visible to it; 0 if it trains on the CPU."""
    host: str
    pid: int
    machine: str
    container: str

    def to_dict(self) -> dict:
        """For JSON."""
        return asdict(self)


def this_peer(info: RankInfo, gpus: int) -> Peer:
    """This process, whose environment gives ``info``, with that number of visible GPUs."""
    host, boot = socket.gethostname(), Path("/proc/sys/kernel/random/boot_id")
    machine = f"{boot.read_text().strip() if boot.exists() else ''} {host}"
    namespaces = [path for path in map(Path, ("/proc/self/ns/mnt", "/proc/self/ns/pid")) if path.exists()]
    return Peer(rank=info.rank, size=info.size, local_rank=info.local_rank, local_size=info.local_size,
                launcher=info.launcher, gpus=gpus, host=host, pid=os.getpid(), machine=machine,
                container=" ".join([machine, *(str(path.stat().st_ino) for path in namespaces)]))  # fmt: skip


def size_conflict(peers: Sequence[Peer], size: int) -> str | None:
    """How the world size of one of ``peers`` differs from ``size``, that of rank 0."""
    for peer in peers:
        if peer.size != size:
            return (
                f"WORLD_SIZE={peer.size} on rank {peer.rank} ({peer.host}), but {size} on rank 0; start all processes of a run "
                "with the same"
            )
    return None


def repeated(peers: Sequence[Peer]) -> str | None:
    """Which rank several of ``peers`` have; one that a launcher has started again may, if the first has ended."""
    first: dict[int, Peer] = {}
    for peer in peers:
        other = first.setdefault(peer.rank, peer)
        if other != peer:
            return f"rank {peer.rank} has come from {other.host}, pid {other.pid}, and from {peer.host}, pid {peer.pid}"
    return None


def locals_of(peers: Sequence[Peer]) -> list[Local]:
    """Of each of ``peers``, one for every rank in order, its rank on its machine: as given, or counted where it is not.

    Raises InputError, which names the variables, if what is given cannot be true of what is counted.
    """
    if all(peer.local_size is not None for peer in peers):
        return [Local(peer.local_rank, peer.local_size) for peer in peers]
    numbered = all(peer.local_rank is not None for peer in peers)
    by_container = _groups(peers, "container")
    for groups in [_groups(peers, "machine"), by_container] if numbered else [by_container]:
        if all(map(_fits, groups)):
            counted = {peer.rank: Local(local, len(group)) for group in groups for local, peer in enumerate(group)}
            return [counted[peer.rank] for peer in peers]
    wrong = next(group for group in by_container if not _fits(group))
    raise InputError(_contradiction(wrong))


def gpus_of(peers: Sequence[Peer], everyone: Sequence[Local]) -> list[int]:
    """The number of the GPU that each of ``peers`` trains on; empty if all train on CPUs. A launcher that shows each process
    one GPU only calls it the first.

    Raises InputError if one has none: on every process, so that no other one waits for it.
    """
    if not any(peer.gpus for peer in peers):
        return []
    numbers = []
    for peer, local in zip(peers, everyone, strict=True):
        # torchrun shows all GPUs to each process.
        is_alone = peer.gpus == 1 and not (peer.launcher == "torchrun" and peer.local_size is not None)
        numbers.append(0 if is_alone else local.rank)
        if numbers[-1] >= peer.gpus:
            raise InputError(
                f"process {local.rank} of {peer.host} (rank {peer.rank}) has no GPU, it sees {peer.gpus}, but others have: "
                "start fewer processes there; `fastmae doctor` on that machine shows why torch sees none"
            )
    return numbers


def _groups(peers: Sequence[Peer], by: str) -> list[list[Peer]]:
    """The peers of each machine or container, in order of their local ranks, or of their ranks."""
    groups = defaultdict(list)
    for peer in peers:
        groups[getattr(peer, by)].append(peer)
    return [sorted(group, key=lambda p: (p.local_rank or 0, p.rank)) for group in groups.values()]


def _fits(group: list[Peer]) -> bool:
    """Whether what its peers were given is true if these are all processes of a machine."""
    return all(peer.local_rank in (None, number) and peer.local_size in (None, len(group)) for number, peer in enumerate(group))


def _contradiction(group: list[Peer]) -> str:
    ranks, given = (
        ", ".join("none" if value is None else str(value) for value in values[:_MOST_NAMED])
        for values in ([p.rank for p in group], [p.local_rank for p in group])
    )
    sizes = {p.local_size for p in group} - {None}
    size = f"LOCAL_WORLD_SIZE is {min(sizes)}, " if sizes else ""
    return (
        f"{size}LOCAL_RANK is {given} on ranks {ranks}, but {len(group)} processes of the run were counted on {group[0].host}; "
        f"local ranks go from 0 to {len(group) - 1}: set LOCAL_RANK and LOCAL_WORLD_SIZE for every process"
    )
