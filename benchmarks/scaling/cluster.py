"""The modelled cluster: stated parameters, and what a collective costs on it.

    ring   (W-1)/W S / rate + (W-1) hops              all-gather, reduce-scatter; an all-reduce takes two
    tree   2 S / rate + 2 (processes of a machine - 1 + log2 machines) hops           all-reduce, where it is faster

S bytes, W processes. A group inside a machine goes at the links' rate, one over machines at its network cards' (or at the
links', if these are slower). Sources: Thakur et al. 2005 (doi 10.1177/1094342005051521) for rings; Sanders et al. 2009 (doi
10.1016/j.parco.2009.09.001) for two trees that use both directions.
"""

import ast
import inspect
import itertools
import math
import textwrap
from dataclasses import dataclass, fields

from fastmae.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """What the model of a step assumes. Every value is a parameter; none was measured by a committed result."""

    sheet_flops: float = 989e12
    """Dense bf16 FLOP/s of the data sheet, H100 SXM and H200. Changes no time: only the comparison with others uses it."""
    matmul_flops: float = 790e12
    """FLOP/s of a large bf16 matrix product; reached on an H200."""
    utilisation: float = 0.5
    """Share of that rate that a step of large batches reaches; an assumption, compared below with what others reached."""
    memory_bytes: float = 3.35e12
    """Bytes/s of a GPU's memory; H100 SXM data sheet."""
    memory_share: float = 0.9
    """Share of it that a long copy reaches; as on an H200, 4.3 of 4.8 TB/s."""
    gpus_per_machine: int = 8
    """GPUs that links connect; DGX H100 data sheet."""
    link_bytes: float = 450e9
    """Bytes/s of a GPU's links in one direction; H100 SXM data sheet, NVLink: 900 GB/s both directions."""
    network_bytes: float = 50e9
    """Bytes/s of a GPU's own network card; DGX H100 data sheet, eight of 400 Gbit/s."""
    link_share: float = 0.8
    """Share of links' and cards' rates that large collectives reach; an assumption."""
    link_hop: float = 3.4e-6
    """Seconds from GPU to GPU in a machine; NCCL's src/graph/tuning.cc, hwLat, ring, simple protocol."""
    network_hop: float = 14e-6
    """Seconds from machine to machine; the same table, network."""
    collective: float = 8.4e-6
    """Fixed seconds of a collective; the same file, baseLat."""
    message: float = 30e-6
    """Seconds of a small TCP message between processes; an assumption. A ring passes 2 (W-1) of them in a row:
    ring of gloo's gloo/allreduce.cc."""
    launch: float = 5e-6
    """Seconds of CPU time from one kernel's launch to the next; a plain torch call on a CPU, and an assumption for a GPU's."""
    launches_per_block: int = 51
    """Kernels of a transformer block, forward and backward, not compiled: operators called under autocast, without views, as a
    test counts them. A compiled block launches fewer."""
    launches_besides: int = 67
    """Kernels of embedding, bridge and head; counted in the same way."""

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if not (math.isfinite(value) and value > 0):
                raise InputError(f"{field.name} must be positive, got {value}")
        for name in ("utilisation", "memory_share", "link_share"):
            if getattr(self, name) > 1:
                raise InputError(f"{name} is a share and must be at most 1, got {getattr(self, name)}")

    @property
    def flops(self) -> float:
        """FLOP/s of the model's work."""
        return self.matmul_flops * self.utilisation

    def move_seconds(self, size: float) -> float:
        """Of reading or writing ``size`` bytes of a GPU's memory."""
        return size / (self.memory_bytes * self.memory_share)

    def collective_seconds(self, kind: str, size: int, machines: int, local: int) -> float:
        """Of a collective of ``size`` bytes in all, by GPUs of ``machines``, ``local`` on each."""
        W = machines * local
        if W == 1:
            return 0.0
        rate = self.link_share * (self.link_bytes if machines == 1 else
                                  self.network_bytes if local == 1 else
                                  min(self.link_bytes, local * self.network_bytes))  # fmt: skip
        # A ring leaves a machine once; a tree has a chain inside each machine and its branches between them.
        hops = (machines - 1) * self.network_hop + machines * (local - 1) * self.link_hop
        turn = (W - 1) / W * size / rate + hops
        if kind != "all_reduce":
            return self.collective + turn
        depth = math.log2(machines) * self.network_hop + (local - 1) * self.link_hop
        return self.collective + min(2 * turn, 2 * size / rate + 2 * depth)

    def vote_seconds(self, machines: int, local: int) -> float:
        """Of an all-reduce of a few numbers, on CPUs: a ring in each machine, a ring of machines, a tree back."""
        if machines == 1 or local == 1:
            return 2 * (machines * local - 1) * self.message
        return (2 * (local - 1) + 2 * (machines - 1) + math.ceil(math.log2(local))) * self.message


def explained(kind: type) -> dict[str, str]:
    """The docstring under each field of a dataclass: unit and origin."""
    body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0].body
    return {a.target.id: " ".join(b.value.value.split()) for a, b in itertools.pairwise(body) if isinstance(a, ast.AnnAssign)}
