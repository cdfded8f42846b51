"""How many processes share a machine, where the launcher does not give it, and what cannot be true of them."""

import pytest

from fastmae.errors import InputError
from fastmae.train.distributed.launcher import RankInfo
from fastmae.train.distributed.peers import Local, Peer, gpus_of, locals_of, repeated, size_conflict, this_peer

UNKNOWN = (None, None)


def peers_of(*machines, gpus=0, launcher="torchrun", **changes):
    """A peer for each (host, boot id, namespace, local rank, local size), in order of their ranks."""
    return [
        Peer(rank=rank, size=len(machines), local_rank=local[0], local_size=local[1], launcher=launcher, gpus=gpus, host=host,
             pid=rank, machine=f"{boot} {host}", container=f"{boot} {host} {space}", **changes)
        for rank, (host, boot, space, *local) in enumerate(machines)
    ]  # fmt: skip


def test_what_the_launcher_gives_is_taken():
    one_machine_that_plays_two = peers_of(*(("a", "1", "x", rank % 2, 2) for rank in range(4)))
    assert locals_of(one_machine_that_plays_two) == [Local(0, 2), Local(1, 2)] * 2


@pytest.mark.parametrize("order", [(0, 1, 2, 0, 1), (2, 0, 1, 1, 0)])  # of local ranks, which need not be that of the ranks
def test_processes_of_a_machine_are_counted(order):
    peers = peers_of(*((f"n{rank // 3}", "123"[rank // 3], "x", order[rank], None) for rank in range(5)))
    assert locals_of(peers) == [Local(local, 3 if rank < 3 else 2) for rank, local in enumerate(order)]


def test_tasks_with_a_container_each_are_on_one_machine():
    assert locals_of(peers_of(*(("a", "1", f"space {rank}", rank, None) for rank in range(3)))) == [
        Local(rank, 3) for rank in range(3)
    ]


def test_containers_that_share_a_host_name_and_kernel_are_told_apart():
    peers = peers_of(*(("pod", "1", "xy"[rank // 2], rank % 2, None) for rank in range(4)))
    assert locals_of(peers) == [Local(0, 2), Local(1, 2)] * 2
    alone = peers_of(*(("pod", "1", "xyz"[rank], *UNKNOWN) for rank in range(3)))
    assert locals_of(alone) == [Local(0, 1)] * 3


def test_without_local_ranks_they_are_given_in_order_of_the_ranks():
    apart = peers_of(("a", "1", "x", *UNKNOWN), ("b", "2", "x", *UNKNOWN))
    assert locals_of(apart) == [Local(0, 1)] * 2  # one process a machine, as operators start them
    dealt = peers_of(*(("ab"[rank % 2], "12"[rank % 2], "x", *UNKNOWN) for rank in range(4)))
    assert locals_of(dealt) == [Local(0, 2), Local(0, 2), Local(1, 2), Local(1, 2)]


@pytest.mark.parametrize(
    ("machines", "message"),
    [
        ([("a", "1", "x", 0, None), ("a", "1", "x", 0, None)], "LOCAL_RANK is 0, 0 on ranks 0, 1, but 2 processes .* on a"),
        ([("a", "1", "x", 0, None), ("b", "2", "x", 1, None)], "LOCAL_RANK is 1 on ranks 1, but 1 processes .* on b"),
        ([("a", "1", "x", 0, 4), ("a", "1", "x", 1, None)], "LOCAL_WORLD_SIZE is 4, LOCAL_RANK is 0, 1 on ranks 0, 1, but 2"),
        ([("a", "1", "x", None, None), ("a", "1", "x", 0, None)], "LOCAL_RANK is none, 0 on ranks 0, 1"),
    ],
)
def test_what_cannot_be_true_of_the_counted_names_the_variables(machines, message):
    with pytest.raises(InputError, match=message):
        locals_of(peers_of(*machines))


def test_world_sizes_that_differ_are_named():
    peers = [*peers_of(("a", "1", "x", 0, 1)), *peers_of(("b", "1", "x", 0, 1), ("c", "1", "x", 0, 1))]
    assert size_conflict(peers[1:], 2) is None
    assert size_conflict(peers, 1).startswith("WORLD_SIZE=2 on rank 0 (b), but 1 on rank 0")


def test_a_rank_that_comes_twice_is_named():
    one, two = peers_of(("a", "1", "x", 0, 1)), peers_of(("b", "1", "x", 0, 1))
    assert repeated([*one, *one]) is None
    assert repeated([*one, *two]) == "rank 0 has come from a, pid 0, and from b, pid 0"


def test_each_process_has_a_gpu_or_all_raise_that_one_has_none():
    two = [("a", "1", "x", 0, 2), ("a", "1", "x", 1, 2)]
    assert gpus_of(peers_of(*two), [Local(0, 2), Local(1, 2)]) == []
    assert gpus_of(peers_of(*two, gpus=2), [Local(0, 2), Local(1, 2)]) == [0, 1]
    assert gpus_of(peers_of(*two, gpus=1, launcher="slurm"), [Local(0, 2), Local(1, 2)]) == [0, 0]  # shown one each
    for mixed in (peers_of(*two, gpus=1), [*peers_of(two[0], gpus=2), *peers_of(two[1])]):
        with pytest.raises(InputError, match=r"process [01] of a \(rank [01]\) has no GPU, it sees [01]"):
            gpus_of(mixed, [Local(0, 2), Local(1, 2)])


def test_processes_of_this_machine_publish_the_same_of_it():
    peer = this_peer(RankInfo(rank=3, size=4, local_rank=None, local_size=None), 0)
    assert Peer(**peer.to_dict()) == peer
    again = this_peer(RankInfo(), 0)
    assert (again.machine, again.container) == (peer.machine, peer.container) and peer.host in peer.machine
