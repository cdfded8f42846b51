"""The groups of a run cost NCCL's communicator the same collective calls on every rank: none."""

from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from fastmae.train.distributed.join import make_groups
from fastmae.train.distributed.peers import Local

LAYOUTS = [(2, 2), (3, 4)]  # machines, processes on each
UNEVEN = [Local(0, 2), Local(1, 2), *(Local(rank, 4) for rank in range(4)), Local(0, 2), Local(1, 2)]


def blocks(machines, local):
    return [Local(rank % local, local) for rank in range(machines * local)]


@contextmanager
def rank_of_gpus(rank, size):
    """This process as ``rank`` of a group bound to a GPU, as NCCL's is; yields the splits of its communicator that follow."""
    splits = []

    class Communicator:
        supports_splitting = True

        def perform_nocolor_split(self, device):
            splits.append(device)

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    split_source = distributed_c10d._get_split_source
    try:
        distributed_c10d._get_default_group().bound_device_id = torch.device("cuda", rank)
        distributed_c10d._get_split_source = lambda group: Communicator()
        yield splits
    finally:
        distributed_c10d._get_split_source = split_source
        dist.destroy_process_group()


def splits_of_all(size, make):
    counts, names = [], []
    for rank in range(size):
        with rank_of_gpus(rank, size) as splits:
            made = make(rank)
            counts.append(len(splits))
            names.append([group and (dist.get_process_group_ranks(group), group.group_name) for group in made])
    return counts, names


@pytest.mark.parametrize(("machines", "local"), LAYOUTS)
def test_no_rank_splits_the_communicator_for_the_groups_of_a_run(machines, local):
    size = machines * local

    def make(rank):  # twice, since names tell how many groups there were
        return [group for _ in range(2) for group in make_groups(blocks(machines, local), backend="fake")]

    counts, names = splits_of_all(size, make)
    assert counts == [0] * size
    check_groups([made[:4] for made in names], size, local)
    check_groups([made[4:] for made in names], size, local)


def check_groups(names, size, local):
    """Each is made of the right ranks, and under one name by all of them, which no other one has."""
    for rank, (control, background, machine, leaders) in enumerate(names):
        first = rank - rank % local
        assert control[0] == background[0] == list(range(size)) and control[1] != background[1]
        assert machine[0] == list(range(first, first + local)) and machine == names[first][2]
        assert leaders == (names[0][3] if rank == first else None)
    assert names[0][3][0] == list(range(0, size, local))
    assert len({machine[1] for _, _, machine, _ in names} | {names[0][3][1]}) == size // local + 1


@pytest.mark.parametrize("everyone", [UNEVEN, blocks(2, 2)[::2] + blocks(2, 2)[1::2], blocks(4, 1), blocks(1, 4)])
def test_all_ranks_know_when_there_are_no_groups_of_machines(everyone):
    _, names = splits_of_all(len(everyone), lambda rank: make_groups(everyone, backend="fake"))
    assert all(made[2:] == [None, None] for made in names)


@pytest.mark.parametrize(("machines", "local"), LAYOUTS)
def test_hsdp_splits_the_communicator_as_often_on_every_rank(machines, local):
    def mesh(rank):
        return init_device_mesh("cpu", (machines, local), mesh_dim_names=("replicate", "shard")).get_all_groups()

    counts, _ = splits_of_all(machines * local, mesh)
    # On GPUs it calls split_group, of which each rank makes one call a dimension; here the groups one by one.
    assert counts == [(local - 1) + (machines - 1)] * (machines * local)
