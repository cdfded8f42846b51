"""Memory that cannot be had: one line that names flags which need less, whoever it was that did not get it."""

import errno
import os
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch._inductor.exc import InductorError

from fastmae.data.crops import Cropper
from fastmae.errors import DataError
from fastmae.images import decode as decode_file
from fastmae.images.decode import decode
from fastmae.train.cli.main import main
from fastmae.train.config.run import accumulation
from fastmae.train.distributed.world import World
from fastmae.train.pretrain.out_of_memory import is_out_of_memory, out_of_memory, smaller_batch
from fastmae.train.step.step import Step
from tests.support import faults
from tests.support.crew import Crew
from tests.support.runs import FLAGS, RECIPE, run_of

CUDA = (
    "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 139.72 GiB of which 12.50 MiB is free. "
    "Process 7 has 100.00 GiB memory in use. Of the allocated memory 99.00 GiB is allocated by PyTorch."
)
GPU, CPU = World(0, 1, torch.device("cuda", 0)), World(0, 1, torch.device("cpu"))
LARGE = replace(RECIPE, effective_batch=96)


def caught(work):
    """What ``work`` raises, for real."""
    with pytest.raises(Exception) as raised:
        work()
    return raised.value


def raised_while_handling(first, second):
    try:
        try:
            raise first
        finally:
            raise second
    except type(second) as error:
        return error


REAL = {  # of this machine, and as the libraries of a GPU word it
    "torch on the CPU": lambda: caught(lambda: torch.empty(1 << 50)),
    "numpy": lambda: caught(lambda: np.empty(1 << 60, np.uint8)),
    "python": lambda: caught(lambda: bytearray(1 << 62)),
    "mmap": lambda: OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)),
    "C++": lambda: RuntimeError("std::bad_alloc"),
    "oneDNN": lambda: RuntimeError("could not create a memory object"),
    "torch on a GPU": lambda: torch.OutOfMemoryError(CUDA),
    "a kernel": lambda: RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    "cuBLAS": lambda: RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "NCCL": lambda: torch.distributed.DistBackendError("NCCL error in: NCCLUtils.cpp:77, unhandled cuda error, NCCL version "
                                                       "2.27.5\nLast error:\nCuda failure 2 'out of memory'"),
    "compiled code": lambda: InductorError(torch.OutOfMemoryError(CUDA), None),
    "a graph's capture": lambda: raised_while_handling(torch.OutOfMemoryError(CUDA), RuntimeError("capture was invalidated")),
    "a worker": lambda: RuntimeError("a worker process failed:\nTraceback\n  File 'x'\nMemoryError: Unable to allocate 4 GiB"),
}  # fmt: skip


@pytest.mark.parametrize("who", REAL)
def test_whoever_gets_no_memory_the_line_names_a_batch_size_that_can_be_given(who):
    run = run_of("shards", "out", batch_size=96, workers=4)
    error = out_of_memory(REAL[who](), LARGE, run, GPU, "in a step")
    assert "out of memory" in str(error) and "--batch-size 48 --effective-batch 96" in str(error) and "\n" not in str(error)
    assert "each of 2 accumulated micro-batches, or --checkpointing" in str(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("out of resource: shared memory, Required: 262144, Hardware limit: 232448"),
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        DataError("x.tar: cannot be read, Cannot allocate memory"),  # a line already
        KeyError("memory"),
    ],
)
def test_other_errors_are_not_taken_for_it(error):
    assert not is_out_of_memory(error) and out_of_memory(error, LARGE, run_of("s", "o"), CPU, "in a step") is None


def test_the_line_of_a_gpu_has_its_bytes_and_that_of_a_cpu_the_limit(monkeypatch):
    run = run_of("shards", "out", batch_size=96)
    assert str(out_of_memory(REAL["torch on a GPU"](), LARGE, run, GPU, "in a step")).startswith(
        "out of memory on cuda:0, in a step, asked for 20.00 GiB, 12.50 MiB of 139.72 GiB free: --batch-size 96 does not fit; "
    )
    monkeypatch.setattr("resource.getrlimit", lambda _: (6 << 30, 6 << 30))
    assert str(out_of_memory(REAL["torch on the CPU"](), LARGE, run, CPU, "in a step")).startswith(
        f"out of memory on the CPU, in a step, asked for {1 << 22:.3g} GiB, a process may have 6 GiB (ulimit -v): "
    )
    monkeypatch.setattr("resource.getrlimit", lambda _: (-1, -1))
    assert " GiB available: " in str(out_of_memory(REAL["torch on the CPU"](), LARGE, run, CPU, "in a step"))


@pytest.mark.parametrize(
    ("doing", "fields", "model", "world", "says", "not_says"),
    [
        ("in a step", {}, {"checkpointing": True}, GPU, "accumulated micro-batches", "--checkpointing"),
        ("in a step", {"batch_size": 1}, {}, GPU, "--batch-size 1 does not fit; --checkpointing", "--effective-batch"),
        ("in a step", {"batch_size": 1}, {"checkpointing": True}, GPU, "--parallel fsdp", "--checkpointing"),
        ("in a step", {"batch_size": 48, "parallel": "fsdp", "reduce": "bf16"}, {}, World(1, 2, GPU.device),
         "rank 1: out of memory on cuda:0, in a step, asked for 20.00 GiB, 12.50 MiB of 139.72 GiB free: --batch-size 48 does "
         "not fit; --batch-size 24 --effective-batch 96 --reduce fp32", "None"),
        ("starting", {}, {}, World(0, 8, GPU.device), "--parallel fsdp shards", "--batch-size"),
        ("drawing", {}, {}, GPU, "--draw-every None", "gradients"),
    ],
)  # fmt: skip
def test_advice_fits_what_the_run_does_already(doing, fields, model, world, says, not_says):
    recipe = replace(LARGE, model=replace(LARGE.model, **model))
    text = str(
        out_of_memory(torch.OutOfMemoryError(CUDA), recipe, run_of("s", "o", **{"batch_size": 96, **fields}), world, doing)
    )
    assert says in text and not_says not in text


@pytest.mark.parametrize("doing", ["saving", "waiting for the checkpoint", "staging"])
def test_no_smaller_batch_is_advised_where_it_would_not_help(doing):
    said = str(out_of_memory(MemoryError(), LARGE, run_of("s", "o", workers=8), CPU, doing))
    assert said.endswith("give the job more memory, or --workers 4 instead of 8") and "--batch-size" not in said


def test_an_interrupt_is_no_lack_of_memory():
    interrupt = KeyboardInterrupt()
    interrupt.__context__ = MemoryError()
    assert not is_out_of_memory(interrupt)


@pytest.mark.parametrize(("effective", "batch", "processes"), [(96, 96, 1), (4096, 64, 64), (90, 15, 2), (7, 7, 1), (10, 5, 2)])
def test_the_smaller_batch_makes_up_the_same_effective_batch(effective, batch, processes):
    size = smaller_batch(effective, batch, processes)
    assert 1 <= size <= batch // 2 and accumulation(effective, size, processes) * size * processes == effective
    assert smaller_batch(effective, 1, processes) is None


@pytest.mark.parametrize("raised", [lambda: torch.empty(1 << 50), lambda: REAL["torch on a GPU"]()], ids=["CPU", "GPU"])
def test_a_step_that_gets_no_memory_ends_the_run_with_one_line(raised, shard_folder, tmp_path, monkeypatch, capsys):
    def step(*_):
        error = raised()
        raise error

    monkeypatch.setattr(Step, "__call__", step)
    assert main(["pretrain", "tiny", "--data", str(shard_folder), "--out", str(tmp_path), "--batch-size", "8",
                 "--steps", "1", "--warmup-epochs", "0",
                 *FLAGS, "--workers", "0"]) == 2  # fmt: skip
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert line.startswith("fastmae: out of memory on ") and "--batch-size 4 --effective-batch 8" in line


def test_a_worker_that_gets_no_memory_ends_the_run_and_no_sample_is_called_bad(shard_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Cropper, "__call__", lambda *_: np.empty(1 << 60, np.uint8))
    assert main(["pretrain", "tiny", "--data", str(shard_folder), "--out", str(tmp_path), "--batch-size", "8",
                 "--steps", "1", "--warmup-epochs", "0",
                 *FLAGS, "--workers", "2"]) == 2  # fmt: skip
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert line.startswith("fastmae: out of memory in a loader worker, asked for 1.00 EiB")
    assert "--workers 1 instead of 2, --prefetch 2 instead of 4, --batch-size 8 does not fit" in line


def test_an_image_is_not_called_damaged_for_want_of_memory(monkeypatch):
    def pillow(*_):
        raise MemoryError

    monkeypatch.setattr(decode_file, "_decode_with_pillow", pillow)
    with pytest.raises(MemoryError):
        decode(b"\x89PNG")


def test_another_command_that_gets_no_memory_ends_with_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("fastmae.train.report.report.write_report", lambda *_: bytearray(1 << 62))
    assert main(["report", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "fastmae: out of memory: MemoryError; this machine has too little\n"


@pytest.mark.cluster
def test_where_one_process_gets_no_memory_all_end_and_its_line_is_heard(shard_folder, tmp_path):
    fault = partial(faults.out_of_memory_at, 2, 1)
    with Crew(2, shard_folder, tmp_path / "run", "--steps", "5", fault=fault) as crew:
        assert crew.end(60) == [4, 2], crew.text()
        assert "fastmae: rank 1: out of memory on the CPU, in a step, asked for" in crew.text(1)
        assert "--batch-size 3 --effective-batch 12" in crew.text(1) and "Traceback" not in crew.text()
        assert "rank 1 has failed, InputError: rank 1: out of memory on the CPU" in crew.text(0)
