"""A contender's process: its losses, its memory, and how its failures reach the one that asks."""

import os
import signal
from functools import partial
from typing import ClassVar
from unittest.mock import Mock

import pytest
import torch

from fastmae.benchmarks.training import worker
from fastmae.benchmarks.training.contenders import Contender
from fastmae.benchmarks.training.worker import OutOfMemory, Worker, losses_of
from fastmae.errors import InputError

CPU = torch.device("cpu")


def broken(kind):
    if kind == "input":
        raise InputError("no such clone")
    if kind == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    nothing = torch.zeros(())
    return Contender(lambda: 1 / 0, lambda *_: nothing, nothing, lambda: nothing, description="broken")


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("input", InputError, "no such clone"),
        ("killed", OutOfMemory, "was killed"),
        ("step", RuntimeError, "ZeroDivision"),
    ],
)
def test_a_workers_failure_is_told(kind, error, message):
    with Worker(partial(broken, kind), CPU) as broken_one, pytest.raises(error, match=message):
        broken_one.seconds(1)


class FullWorker:
    """Has memory for its losses once the others have theirs."""

    order: ClassVar[list[str]] = []

    def __init__(self, name, fails):
        self.name, self.fails = name, fails

    def ask_losses(self, seed):
        self.order.append(f"ask {self.name}")

    def losses(self, seed):
        self.order.append(self.name)
        if self.fails:
            self.fails = False
            raise OutOfMemory("out of memory")
        return 1.0, 2.0


def test_losses_are_asked_of_all_at_once_and_again_of_whom_memory_lacked():
    workers = {"a": FullWorker("a", True), "b": FullWorker("b", False)}
    assert list(losses_of(workers, 7).items()) == [("a", (1.0, 2.0)), ("b", (1.0, 2.0))]
    assert FullWorker.order == ["ask a", "ask b", "a", "b", "a"]


@pytest.fixture
def fake_cuda(monkeypatch):
    """torch.cuda's memory as numbers, and what was asked of it in order: a step peaks at 70 bytes, and keeps 50 reserved."""
    cuda = Mock(
        spec=["empty_cache", "reset_peak_memory_stats", "synchronize", "max_memory_allocated", "memory_reserved", "step"]
    )
    cuda.max_memory_allocated.return_value, cuda.memory_reserved.return_value = 70, 50
    for name in ("empty_cache", "reset_peak_memory_stats", "synchronize", "max_memory_allocated", "memory_reserved"):
        monkeypatch.setattr(torch.cuda, name, getattr(cuda, name))
    return cuda


def test_peak_memory_is_that_of_a_settled_step_or_what_a_graph_keeps(fake_cuda):
    nothing = torch.zeros(())
    contender = Contender(fake_cuda.step, lambda *_: nothing, nothing, lambda: nothing, description="")
    assert worker._peak_memory(contender, torch.device("cuda")) == 70
    names = [call[0] for call in fake_cuda.method_calls]
    assert names[:4] == ["empty_cache", "reset_peak_memory_stats", "step", "synchronize"]
    fake_cuda.memory_reserved.return_value = 90  # a replayed graph allocates nothing, and its pool stays
    assert worker._peak_memory(contender, torch.device("cuda")) == 90


def test_a_worker_frees_its_cache_whenever_its_turn_ends(fake_cuda):
    pipe = Mock()
    pipe.recv.side_effect = [("description",), ("losses", 7), ("seconds", 2), EOFError]
    fake_cuda.empty_cache.side_effect = lambda: pipe.freed()
    nothing = torch.zeros(())
    worker._serve(pipe, lambda: Contender(lambda: None, lambda *_: nothing, nothing, lambda: nothing, description="one"),
                  torch.device("cuda"), torch.get_num_threads())  # fmt: skip
    assert [call[0] for call in pipe.method_calls] == ["recv", "freed", "send"] * 3 + ["recv"]
    assert pipe.send.call_args_list[0].args == (("answer", "one"),)
