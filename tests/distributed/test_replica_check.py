"""Weights that are no longer the same on all processes are found, and where."""

from functools import partial

import pytest
import torch

from fastmae import MAE
from fastmae.train.distributed.replica_check import check_replicas, checksum
from fastmae.train.distributed.world import World
from tests.support import faults
from tests.support.crew import Crew
from tests.support.runs import MODEL


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("count", [1, 2, 37])
def test_every_flipped_bit_changes_the_checksum(dtype, count):
    x = torch.randn(count).to(dtype)
    bits, found = x.view(torch.uint8), set()
    for byte in range(len(bits)):
        for bit in range(8):
            bits[byte] ^= 1 << bit
            found.add(checksum(x).item())
            bits[byte] ^= 1 << bit
    assert checksum(x).item() not in found and len(found) > 0.99 * 8 * len(bits)


def test_swapped_values_change_the_checksum_and_equal_ones_do_not():
    x = torch.randn(5, 7)
    swapped = x.clone()
    swapped[0, 0], swapped[4, 6] = x[4, 6], x[0, 0]
    assert checksum(swapped) != checksum(x) and checksum(x.clone()) == checksum(x)
    assert checksum(x.t().contiguous().t()) == checksum(x)  # the values, however they lie


def test_zero_and_minus_zero_are_told_apart():
    assert checksum(torch.zeros(3)) != checksum(-torch.zeros(3))


def test_alone_there_is_nothing_to_compare():
    model = MAE(MODEL)
    model.norm.weight.data[0] = torch.nan
    check_replicas(model, World(0, 1, torch.device("cpu")), 7)


def flip_a_bit(model):
    with torch.no_grad():
        model.decoder_blocks[0].mlp.fc1.weight.view(torch.int32)[3, 5] ^= 1


def swap_two(model):
    with torch.no_grad():
        weight = model.decoder_blocks[0].mlp.fc1.weight
        weight[[0, 1]] = weight[[1, 0]]


@pytest.mark.cluster
@pytest.mark.parametrize("damage", [flip_a_bit, swap_two])
def test_a_process_whose_memory_changes_ends_the_run_with_its_name(damage, shard_folder, tmp_path):
    flags = ("--steps", 8, "--check-replicas", 2)
    with Crew(2, shard_folder, tmp_path / "run", *flags, fault=partial(faults.damage_weights, damage, 5, 1)) as crew:
        assert crew.end() == [3, 3], crew.text()
        said = "the weights of rank 1 are not those of rank 0 after step 6: decoder_blocks.0.mlp.fc1.weight and"
        assert said in crew.text(0) and said in crew.text(1)
        assert "step 5/8" in crew.text(0)
