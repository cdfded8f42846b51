"""The preflight check: two machines of two processes, what differs between them is named, what is wrong is counted."""

import os
import re
import shutil
import time
from functools import partial

import pytest
import torch

from fastmae.errors import InputError
from fastmae.train.cli.main import main
from fastmae.train.config.settings import DoctorSettings
from fastmae.train.distributed import shared_folder
from fastmae.train.distributed.world import World
from fastmae.train.doctor import bandwidth, clocks, inventory
from fastmae.train.doctor.bandwidth import Rate
from fastmae.train.doctor.findings import Report
from fastmae.train.doctor.inventory import Gpu, Inventory, machines_of
from fastmae.train.doctor.preflight import compare, examine, preflight
from tests.support.crew import Crew
from tests.support.runs import RECIPE, run_of

ALONE = World(0, 1, torch.device("cpu"))


def quick(rank):
    """Small messages."""
    bandwidth._BYTES = {"cpu": 1 << 20}


@pytest.mark.all
@pytest.mark.cluster
def test_two_machines_that_are_fine(shard_folder, tmp_path):
    with Crew(4, shard_folder, tmp_path / "run", local=2, command="doctor", fault=quick) as crew:
        assert crew.end() == [0] * 4, crew.text()
        assert crew.text(1, 2, 3) == ""
        text = crew.text(0)
    assert text.startswith("4 processes on 2 machines\n") and re.search(r"\nerrors: 0, warnings: \d+\n$", text)
    for pattern in (
        r"  \S+: ranks 0-1, CPU, \d+ cores", r"  \S+: ranks 2-3, CPU, \d+ cores", r"the same on all ranks: .*torch \d",
        r"--data \S+: 37 samples in 4 shards, fingerprint \w+, the same on every rank",
        r"--out \S+: the same folder on every rank, \d+ bytes \([\d.]+ GB\) free, a checkpoint takes 0\.\d\d GB",
        r"all-reduce within machines \(gloo, 1 MiB, 2 ranks, median\): [\d.]+ GB/s, bus [\d.]+ GB/s, the slowest of 2 groups",
        r"all-reduce between machines \(gloo, 1 MiB, 2 ranks, median\)", r"all-reduce over all ranks \(gloo, 1 MiB, 4 ranks",
        r"batch 3 per process in fp32: fits; the largest that does is \d+ \(an estimate: 0\.\d\d GB of the [\d.]+ GB",
    ):  # fmt: skip
        assert re.search(pattern, text), (pattern, text)
    offset, uncertainty = map(float, re.search(r"\nclocks: at most (\S+) s from rank 0's, \+- (\S+) s\n", text).groups())
    assert abs(offset) <= uncertainty + 1e-4  # it is one clock
    assert not list((tmp_path / "run").iterdir())


def differing(folder, rank):
    """Rank 3 has another triton and another NCCL variable; the second machine another clock, another out, other data."""
    quick(rank)
    os.chdir(folder / f"machine-{rank // 2}")
    shared_folder._APPEARS = 1
    if rank == 3:
        inventory.triton.__version__ = "3.0.0"
        inventory.versions = partial(_with_another_nccl, inventory.versions)
        os.environ["NCCL_ALGO"] = "Tree"
    if rank >= 2:
        now = clocks.now
        clocks.now = lambda: now() + 90


def _with_another_nccl(versions):
    return {**versions(), "nccl": "2.1.0"}


@pytest.mark.cluster
def test_what_differs_is_named_with_the_ranks_and_what_to_do(shard_folder, small_folder, tmp_path):
    for number, shards in enumerate((shard_folder, small_folder)):
        shutil.copytree(shards, tmp_path / f"machine-{number}" / "shards")
    flags = ("--out", "run", "--data", "shards", "--batch-size", "2")
    with Crew(4, "shards", tmp_path / "run", *flags, local=2, command="doctor", fault=partial(differing, tmp_path)) as crew:
        assert crew.end() == [2] * 4, crew.text()
        text = crew.text(0)
    errors, warnings = ([line for line in text.splitlines() if line.startswith(kind)] for kind in ("error: ", "warning: "))
    for pattern in (
        r"nccl differs: \S+ on ranks 0-2; 2\.1\.0 on rank 3; install the same version everywhere",
        r"--data shards: is not the same everywhere: 37 samples in 4 shards, fingerprint \w+ on ranks 0-1; 13 samples in 3 "
        r"shards, fingerprint \w+ on ranks 2-3; give a folder that all machines share",
        r"--out run: is not the same folder on ",
        r"effective batch 12 must be a multiple of 2 per process x 4 processes = 8",
    ):
        assert sum(bool(re.match(f"error: {pattern}", line)) for line in errors) == 1, (pattern, text)
    for pattern in (
        r"triton differs: \S+ on ranks 0-2; 3\.0\.0 on rank 3",
        r"NCCL_ALGO differs: unset on ranks 0-2; Tree on rank 3",
        r"clock of \S+ \(rank 2\): \+(89\.9|90\.0)\d+ s from rank 0's, \+- 0\.\d+ s; start an NTP client",
    ):
        assert sum(bool(re.match(f"warning: {pattern}", line)) for line in warnings) == 1, (pattern, text)
    assert text.endswith(f"errors: 4, warnings: {len(warnings)}\n")


def test_one_process_with_a_run_s_flags_looks_at_that_run(shard_folder, tmp_path, capsys, monkeypatch):
    flags = ["doctor", "tiny", "--img-size", "32", "--patch-size", "8", "--device", "cpu"]
    assert main([*flags, "--data", str(shard_folder), "--out", str(tmp_path / "run"), "--batch-size", "4"]) == 0
    text = capsys.readouterr().out
    assert "devices:" in text and "1 process on 1 machine" in text and "all-reduce" not in text
    assert "batch 4 per process in fp32: fits" in text and "errors: 0, " in text
    monkeypatch.setattr("fastmae.train.doctor.machine.report", list)
    assert main([*flags, "--batch-size", "100000000"]) == 2
    text = capsys.readouterr().out
    pattern = (
        r"error: batch 10{8} per process in fp32: does not fit; the largest that does is \d+ .*give --batch-size \d+ --eff"
    )
    assert re.search(pattern + r"ective-batch 10{8} or --checkpointing \(the largest is \d+ with it\)", text), text
    stage = ["--data", str(shard_folder), "--stage", str(tmp_path / "disk" / "deep")]
    assert main([*flags, *stage]) == 0 and "GB to copy to each machine, enough disk space" in capsys.readouterr().out
    monkeypatch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(1 << 30, 0, 1000))
    assert main([*flags, *stage]) == 2
    pattern = rf"error: --stage on \S+ \(rank 0\): {tmp_path}/disk/deep: \d+ bytes are needed, 1000 are free"
    assert re.search(pattern, capsys.readouterr().out) and not (tmp_path / "disk").exists()
    monkeypatch.undo()
    assert main([*flags[:2], "--data", str(tmp_path / "nowhere")]) == 2
    assert f"error: --data on rank 0: {tmp_path / 'nowhere'}" in capsys.readouterr().out


def test_distributed_without_a_launcher_says_how_to_start_it(capsys):
    assert main(["doctor", "--distributed"]) == 2
    assert "torchrun --nproc-per-node 8 -m fastmae.train doctor" in capsys.readouterr().err


def test_one_process_of_a_launcher_is_looked_at_alone(capsys, monkeypatch):
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}.items():
        monkeypatch.setenv(name, str(value))
    assert main(["doctor", "--distributed", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.startswith("1 process on 1 machine\n")


# What was found, in words.


def gpu(**fields):
    return Gpu(**{"index": 0, "name": "H100", "total": 80 << 30, "free": 79 << 30, "uuid": "u", "modes": "", **fields})


def of(rank, host="a", local_rank=None, **fields):
    usual = {"gpu": None, "versions": {"torch": "2.13"}, "shared": (16 << 30, 16 << 30), "files": (1 << 20, 1 << 20)}
    return Inventory(rank=rank, local_rank=rank % 2 if local_rank is None else local_rank, host=host, **{**usual, **fields})


def lines_about(everyone, capsys):
    report = Report(ALONE)
    compare(report, everyone, machines_of(everyone))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("error", "warning"))]
    assert (report.errors, report.warnings) == tuple(sum(line.startswith(kind) for line in lines) for kind in ("err", "warn"))
    return lines


def test_machines_are_told_apart_however_ranks_are_spread():
    def ranks(everyone):
        return [[one.rank for one in machine] for machine in machines_of(everyone)]

    assert ranks([of(0), of(1), of(2, "b"), of(3, "b")]) == [[0, 1], [2, 3]]
    assert ranks([of(0, "a", 0), of(1, "b", 0), of(2, "a", 1), of(3, "b", 1)]) == [[0, 2], [1, 3]]
    assert ranks([of(0), of(1), of(2), of(3)]) == [[0, 1], [2, 3]]  # containers of one host
    assert ranks([of(0), of(1), of(2, "b", 0)]) == [[0, 1], [2]]


def test_two_processes_on_one_gpu_are_an_error(capsys):
    (line,) = lines_about([of(0, gpu=gpu()), of(1, gpu=gpu())], capsys)
    assert line == "error: ranks 0-1 share one GPU (u); start one process for each, or check CUDA_VISIBLE_DEVICES"


def test_gpus_that_differ_or_are_in_use_are_warnings(capsys):
    everyone = [of(0, gpu=gpu(uuid="u")), of(1, gpu=gpu(uuid="v", name="A100", total=40 << 30, free=20 << 30))]
    assert lines_about(everyone, capsys) == [
        "warning: GPUs differ, the slowest and smallest decide: H100 with 80 GiB on rank 0; A100 with 40 GiB on rank 1",
        "warning: rank 1: 20.0 GiB of its GPU are in use by another process",
    ]


def test_a_gpu_that_lacks_is_an_error_that_names_the_rank(capsys):
    everyone = [of(0, gpu=gpu()), of(1, gpu_error="torch sees no CUDA device (is the driver loaded?)"), of(2, "b")]
    assert lines_about(everyone, capsys) == [
        "error: no GPU on rank 1: torch sees no CUDA device (is the driver loaded?)",
        "error: rank 2 would train on the CPU, rank 0 on GPUs; give --device for all",
    ]


def test_a_machine_that_is_short_of_something_is_named(capsys):
    lines = lines_about([of(0), of(1), of(2, "b", shared=(64 << 20, 64 << 20), files=(256, 1024)), of(3, "b"),
                         of(4, "c", 0, shared=None)], capsys)  # fmt: skip
    assert lines == [
        "warning: b (ranks 2-3): /dev/shm has 0.1 of 0.1 GiB free, short for NCCL and streams; give it 8 GiB (docker: "
        "--shm-size 8g)",
        "warning: b (ranks 2-3): 256 open files a process, 1024 at most; ulimit -n 4096",
        "warning: c (rank 4): /dev/shm is missing; NCCL and streams need it: mount a tmpfs there",
    ]


def test_other_sources_of_one_version_are_an_error(capsys):
    everyone = [of(rank, versions={"fastmae": f"0.1.0, sources {'b' if rank == 1 else 'a'}"}) for rank in range(4)]
    assert lines_about(everyone, capsys)[0].startswith(
        "error: fastmae differs: 0.1.0, sources a on ranks 0, 2-3; 0.1.0, sources b"
    )


@pytest.mark.parametrize(("visible", "local_rank", "expected"), [(0, 0, "torch sees no CUDA device"), (1, 3, 0), (4, 3, 3),
                                                                 (2, 2, "process 2 of its machine sees 2 GPUs")])  # fmt: skip
def test_a_process_finds_its_gpu_or_why_not(visible, local_rank, expected, monkeypatch):
    properties = type("Properties", (), {"name": "H100", "total_memory": 80 << 30, "uuid": "u"})
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    kept = [20 << 30]  # by this process, of what was tried before
    monkeypatch.setattr(torch.cuda, "empty_cache", kept.clear)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: ((79 << 30) - sum(kept), 80 << 30))
    monkeypatch.setattr(inventory, "_modes", lambda uuid: f"modes of {uuid}")
    world = World(local_rank, 8, torch.device("cpu"), local_size=8, local_rank=local_rank)
    found, wrong = inventory._gpu(world)
    if isinstance(expected, str):
        assert found is None and wrong.startswith(expected)
    else:
        assert wrong is None and found == gpu(index=expected, total=80 << 30, modes="modes of u")


# All-reduces.


def test_a_network_that_does_not_answer_is_an_error_and_not_a_hang(monkeypatch, capsys):
    assert bandwidth._within(0.05, lambda: time.sleep(1)) == (None, "not done after 0 s")
    assert bandwidth._within(9, lambda: 1 / 0) == (None, "ZeroDivisionError: division by zero")
    monkeypatch.setattr("fastmae.train.doctor.bandwidth.measure_rates", lambda world, device, groups: [
        Rate(ranks=tuple(ranks), bytes=1, seconds=float("nan"), error="not done after 60 s") for ranks in groups])  # fmt: skip
    monkeypatch.setattr("fastmae.train.doctor.clocks.clock_offsets", lambda *_: [])
    world = World(0, 2, torch.device("cpu"), local_size=2)
    monkeypatch.setattr(World, "gather", lambda self, lines: [of(0), of(1)])
    assert examine(world, run_of("x", "y"), RECIPE, has_data=False, has_out=False) == 1
    text = capsys.readouterr().out
    assert "error: all-reduce within machines (gloo) fails on ranks 0-1: not done after 60 s; check the network" in text
    assert "batch" not in text  # a model is not tried on a device that may hang


def test_a_group_that_is_slower_than_the_others_is_named(monkeypatch, capsys):
    rates = [Rate(ranks=(2 * n, 2 * n + 1), bytes=1 << 30, seconds=1.0 if n == 1 else 0.1) for n in range(3)]
    monkeypatch.setattr("fastmae.train.doctor.bandwidth.measure_rates", lambda *_: rates)
    monkeypatch.setattr("fastmae.train.doctor.clocks.clock_offsets", lambda *_: [])
    everyone = [of(rank, "abc"[rank // 2]) for rank in range(6)]
    monkeypatch.setattr(World, "gather", lambda self, lines: everyone)
    assert examine(World(0, 6, torch.device("cpu"), local_size=2), run_of("x", "y"), None, has_data=False, has_out=False) == 0
    assert "warning: all-reduce within machines: ranks 2-3 at 1.07 GB/s, the median is 10.74" in capsys.readouterr().out


def test_wrong_settings_are_told_before_anybody_is_waited_for():
    with pytest.raises(InputError, match="recipe reference-b is not for preset tiny"):
        preflight(DoctorSettings(preset="tiny", recipe="reference-b"))
