"""The state of a run as tensors: shared out evenly, put back exactly, and that of AdamW where it has made none yet."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DeviceMesh, Shard, distribute_tensor

from fastmae.train.checkpoint.state import make_moments, random_state, run_tensors, set_random_state, share_out, total_bytes
from tests.support.saves import WORLD
from tests.support.steps import batch, make_step


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_each_tensor_has_one_writer_and_the_bytes_are_balanced(size):
    model, step = make_step()
    tensors = run_tensors(model, step.optimizer, step=step.tensors())
    shares = [share_out(tensors, replace(WORLD, rank=rank, size=size)) for rank in range(size)]
    assert sorted(name for share in shares for name in share) == sorted(tensors)
    assert all(share[name] is tensors[name] for share in shares for name in share)
    loads = [total_bytes(share) for share in shares]
    largest = max(tensor.nbytes for tensor in tensors.values())
    assert sum(loads) == total_bytes(tensors) and max(loads) - min(loads) <= largest
    again = [share_out(dict(reversed(tensors.items())), replace(WORLD, rank=rank, size=size)) for rank in range(size)]
    assert [list(share) for share in again] == [list(share) for share in shares]  # all ranks agree, whatever the order


@pytest.fixture
def mesh(tmp_path):
    """A mesh of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield DeviceMesh("cpu", [0])
    dist.destroy_process_group()


def test_a_sharded_tensor_is_written_by_every_rank_and_counted_once(mesh):
    tensors = {"sharded": distribute_tensor(torch.ones(6, 5), mesh, [Shard(0)]), "full": torch.ones(3)}
    shares = [share_out(tensors, replace(WORLD, rank=rank, size=3)) for rank in range(3)]
    assert ["sharded" in share for share in shares] == [True, True, True]
    assert ["full" in share for share in shares] == [True, False, False]
    assert total_bytes(tensors) == 4 * (30 + 3)


def test_generators_resume_where_they_were():
    torch.rand(7)
    state = random_state(WORLD)
    drawn = torch.rand(5)
    set_random_state({name: tensor.clone() for name, tensor in state.items()}, WORLD)
    assert torch.equal(torch.rand(5), drawn) and list(state) == ["random/0/cpu"]


@pytest.mark.gpu
def test_generators_on_the_gpu_resume_where_they_were():
    world = replace(WORLD, rank=3, device=torch.device("cuda", 0))
    state = random_state(world)
    drawn = torch.rand(5, device="cuda")
    set_random_state(state, world)
    assert torch.equal(torch.rand(5, device="cuda"), drawn) and sorted(state) == ["random/3/cpu", "random/3/cuda"]


def test_moments_made_before_the_first_step_are_those_that_adamw_makes():
    bits = []
    for makes in (True, False):
        model, step = make_step()
        if makes:
            make_moments(step.optimizer)
        fresh = {name: t.clone() for name, t in run_tensors(model, step.optimizer).items()} if makes else None
        for _ in range(2):
            step([batch()], 1e-3)
        bits.append((run_tensors(model, step.optimizer), fresh))
    (made, fresh), (own, _) = bits
    assert made.keys() == own.keys() and all(torch.equal(made[name], own[name]) for name in own)
    assert all((t.dtype, t.shape, t.device) == (own[n].dtype, own[n].shape, own[n].device) for n, t in fresh.items())
    assert not any(fresh[name].any() for name in fresh if name.startswith("optimizer/"))


def test_moments_that_are_there_stay(device):
    model, step = make_step(device)
    step([batch(device=device)], 1e-3)
    before = {name: t.clone() for name, t in run_tensors(model, step.optimizer).items()}
    make_moments(step.optimizer)
    after = run_tensors(model, step.optimizer)
    assert all(torch.equal(after[name], before[name]) for name in before) and before["optimizer/step/norm.weight"] == 1
    step([batch(device=device)], 1e-3)
    assert after["optimizer/step/norm.weight"] == 2  # the tensors themselves, no copies
