"""The process groups of a run: on the CPU, for votes and texts, beside the one that training uses.

Every rank makes the same number of collective calls for them. With a device bound to the default group, as NCCL's is, torch
(2.11, 2.13) splits its communicator, a collective call, on each rank that is no member of a group that it takes part in making,
gloo's too. So each group here holds all ranks, or is made by its members alone.
"""

from collections.abc import Sequence

import torch.distributed as dist

from fastmae.train.distributed.peers import Local


def make_groups(everyone: Sequence[Local], backend: str = "gloo", **options) -> tuple[dist.ProcessGroup | None, ...]:
    """The groups ``control``, ``background``, ``machine`` and ``leaders`` of a ``World`` whose ranks are ``everyone``.

    ``options`` as of ``dist.new_group``. This rank's machine's first process makes its group before that of the leaders.
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
