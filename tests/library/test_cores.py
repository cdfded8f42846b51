"""How many cores a process may use, where a container's quota allows fewer than the affinity mask names."""

import os
from dataclasses import replace

import pytest
import torch

from fastmae import cores
from fastmae.cores import affinity_cores, cpu_quota, usable_cores
from fastmae.train.distributed import launcher
from fastmae.train.distributed.world import World
from fastmae.train.pretrain import pretrain
from tests.support.runs import RECIPE, run_of
from tests.support.slurm import STEP_OF_TWO

POD = "/kubepods.slice/pod7/main"
DOCKER = "3:cpu,cpuacct:/docker/1f\n2:cpuset:/docker/1f\n0::/docker/1f\n"  # of the host, seen from inside


def system(root, cgroup, **files):
    """A root folder whose process is in ``cgroup``, with files by their path below /sys/fs/cgroup."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(cgroup)
    for path, text in files.items():
        file = root / "sys/fs/cgroup" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


def v1(folder, quota, period=100000):
    return {f"{folder}/cpu.cfs_quota_us": f"{quota}\n", f"{folder}/cpu.cfs_period_us": f"{period}\n"}


@pytest.mark.parametrize(
    ("cgroup", "files", "quota"),
    [
        (f"0::{POD}\n", {f"{POD[1:]}/cpu.max": "200000 100000\n"}, 2),
        (f"0::{POD}\n", {f"{POD[1:]}/cpu.max": "max 100000\n"}, None),
        (f"0::{POD}\n", {f"{POD[1:]}/cpu.max": "max 100000\n", "kubepods.slice/cpu.max": "150000 100000\n"}, 1.5),
        (f"0::{POD}\n", {f"{POD[1:]}/cpu.max": "50000 100000\n", "kubepods.slice/pod7/cpu.max": "900000 100000\n"}, 0.5),
        ("0::/\n", {"cpu.max": "350000 50000\n"}, 7),  # a namespace of cgroups: the container's own is the root
        (DOCKER, {"cpu.max": "200000 100000\n"}, 2),
        (DOCKER, {"unified/cpu.max": "max 100000\n", **v1("cpu,cpuacct", 250000)}, 2.5),
        ("4:cpu:/a/b\n0::/\n", {**v1("cpu/a/b", -1), **v1("cpu/a", 300000), **v1("cpu", -1)}, 3),
        ("4:cpu:/a\n", v1("cpu/a", 200000, 0), None),  # no such period
        ("4:cpuset:/a\n", v1("cpu/a", 200000), None),  # not in that cgroup
        ("0::/\n", {"cpu.max": "what 100000\n"}, None),
        ("", {"cpu.max": "200000 100000\n"}, None),
    ],
)
def test_the_smallest_quota_of_a_cgroup_and_those_above_it_counts(cgroup, files, quota, tmp_path):
    assert cpu_quota(system(tmp_path, cgroup, **files)) == quota


def test_a_system_without_cgroups_sets_no_quota(tmp_path):
    assert cpu_quota(tmp_path) is None


@pytest.fixture
def quota(monkeypatch):
    """A machine of 64 cores whose container may use fewer."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))

    def allow(count):
        for module in (cores, launcher, pretrain):
            monkeypatch.setattr(module, "cpu_quota", lambda: count)

    return allow


@pytest.mark.parametrize(
    ("allowed", "usable", "alone", "of_four"),
    [(None, 64, 63, 15), (2.0, 2, 1, 1), (0.2, 1, 1, 1), (7.5, 8, 7, 1), (99, 64, 63, 15)],
)
def test_workers_and_cores_follow_the_quota(quota, allowed, usable, alone, of_four):
    quota(allowed)
    assert (affinity_cores(), usable_cores()) == (64, usable)
    assert (launcher.default_workers(1), launcher.default_workers(4)) == (alone, of_four)


def test_a_task_that_srun_has_bound_shares_its_containers_quota_and_not_its_own_cores(quota, monkeypatch):
    for name, value in {**STEP_OF_TWO, "SLURM_CPUS_ON_NODE": "128"}.items():
        monkeypatch.setenv(name, value)
    quota(None)
    assert launcher.default_workers() == 63
    quota(16)
    assert launcher.default_workers() == 7


@pytest.mark.parametrize(("allowed", "of_user", "threads"), [(6, None, 3), (None, None, 64), (6, "9", 64), (0.5, None, 1)])
def test_threads_of_torch_follow_the_quota_unless_the_user_sets_them(
    quota, monkeypatch, allowed, of_user, threads, shard_folder, tmp_path
):
    quota(allowed)
    chosen = [64]
    monkeypatch.setattr(torch, "get_num_threads", lambda: chosen[-1])
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if of_user:
        monkeypatch.setenv("OMP_NUM_THREADS", of_user)
    monkeypatch.setattr(pretrain, "join_world", lambda *_: World(0, 1, torch.device("cpu"), local_size=2))
    pretrain.pretrain(replace(RECIPE, steps=1, warmup_epochs=0), run_of(shard_folder, tmp_path))
    assert chosen[-1] == threads
