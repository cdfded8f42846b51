"""Where a run reads and writes, and how fast it goes: what its settings refuse, and how many workers it takes."""

import os

import pytest
import torch

from fastmae import InputError
from fastmae.train.distributed.launcher import default_workers
from fastmae.train.distributed.world import World
from fastmae.train.pretrain import pretrain
from tests.support.runs import RECIPE, run_of
from tests.support.slurm import STEP_OF_TWO


@pytest.fixture
def cores(monkeypatch):
    """A machine that lets this process use twelve cores."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)))


def test_processes_of_a_machine_share_its_cores_among_their_workers(cores, monkeypatch):
    assert default_workers() == 11
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "4"), ("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "4"),
                        ("MASTER_ADDR", "localhost"), ("MASTER_PORT", "1")):  # fmt: skip
        monkeypatch.setenv(name, value)
    assert default_workers() == 2


def test_workers_wait_until_the_processes_of_the_machine_are_counted(cores, monkeypatch, tmp_path):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "4"), ("MASTER_ADDR", "localhost"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    counted = []
    monkeypatch.setattr(pretrain, "join_world", lambda *_: World(0, 1, torch.device("cpu"), local_size=4))
    monkeypatch.setattr(pretrain, "set_up", lambda recipe, run, *_: counted.append(run.workers))
    run = run_of("shards", tmp_path, workers=None)
    assert run.workers is None
    with pytest.raises(AttributeError):
        pretrain.pretrain(RECIPE, run)
    assert counted == [2]


@pytest.mark.parametrize(("on_node", "workers"), [("12", 5), ("24", 11)])
def test_a_task_that_srun_has_bound_to_its_cores_uses_all_of_them(cores, monkeypatch, on_node, workers):
    for name, value in {**STEP_OF_TWO, "SLURM_CPUS_ON_NODE": on_node}.items():
        monkeypatch.setenv(name, value)
    assert default_workers() == workers


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"parallel": "tensor"}, "parallel must be one of ddp, fsdp, hsdp, got 'tensor'"),
        ({"reduce": "fp8"}, "reduce must be one of fp32, bf16, got 'fp8'"),
        ({"precision": "fp8"}, "precision must be one of auto, bf16, fp16, fp32, got 'fp8'"),
        ({"keep_every": 0}, "keep-every must be at least 1, got 0"),
        ({"max_skips": 0}, "max-skips must be at least 1, got 0"),
        ({"timeout": 0.0}, "timeout must be a positive number, got 0"),
        ({"first_timeout": float("nan")}, "first-timeout must be a positive number, got nan"),
        ({"spike_z": -1.0}, "spike-z must be a positive number, got -1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(fields, says, tmp_path):
    with pytest.raises(InputError, match=says):
        run_of("shards", tmp_path, **fields)
