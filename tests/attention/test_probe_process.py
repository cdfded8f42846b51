"""Backends are tried in another process: whatever they do to it, this one continues and knows which did it."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastmae.model.attention import probe_process
from fastmae.model.attention.backends import Shape
from fastmae.model.attention.probe_process import ProbeError, probe_in_child
from fastmae.model.config import BACKENDS
from tests.support.processes import is_alive, wait_until

pytestmark = pytest.mark.worth(2)

SHAPE = Shape(50, 50, 3, 64)


@pytest.fixture
def child(monkeypatch):
    """The program of ``tests.support.probed``; what it is asked for is returned with the number of children."""
    started = []
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: started.append(popen(*a, **k)) or started[-1])

    def use(*arguments, answers=20.0):
        monkeypatch.setattr(probe_process, "_PROGRAM", ("-m", "tests.support.probed", *arguments))
        monkeypatch.setattr(probe_process, "_TRIAL_TIMEOUT", answers)
        return started

    return use


def test_what_ends_a_child_is_named_and_the_rest_is_still_tried(child):
    started = child()
    names = ["works", "aborts", "refuses", "segfaults", "breaks", "is short of memory", "exits", "is killed", "works too"]
    found = probe_in_child("cpu", None, torch.float32, pairs := [(name, SHAPE) for name in names])
    assert list(found) == pairs and len(started) == 6
    assert {name: reason for (name, _), (reason, _) in found.items()} == {
        "works": None,
        "aborts": "crashed: the probe process ended with SIGABRT, a library talks of aborts",
        "refuses": "not here",
        "segfaults": "crashed: the probe process ended with SIGSEGV, a library talks of segfaults",
        "breaks": "illegal memory access",
        "is short of memory": None,
        "exits": "crashed: the probe process ended with exit code 3, a library talks of exits",
        "is killed": "crashed: the probe process ended with SIGKILL, a library talks of is killed",
        "works too": None,
    }
    # A lack of memory, and the OOM killer, are no fault of the backend.
    assert [name for (name, _), (_, lasts) in found.items() if not lasts] == ["is short of memory", "is killed"]


def test_a_backend_that_hangs_is_given_up_at_all_its_shapes_and_leaves_no_process(child):
    started = child(answers=0.5)
    shapes = [(n, 9, 1, 8) for n in (2, 1, 3)]
    found = probe_in_child("cpu", None, torch.float32, [(b, s) for b in ("hangs", "works") for s in shapes])
    hung = "timed out after 0 s"
    assert [found["hangs", s].reason for s in shapes] == [None, hung, hung] and not found["hangs", shapes[1]].lasts
    assert [found["works", s].reason for s in shapes] == [None] * 3
    assert len(started) == 2 and not any(is_alive(process.pid) for process in started)


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("taken", r"the probe process cannot open the GPU, RuntimeError: CUDA-capable device\(s\) is/are busy or unavailable$"),
        ("vanishes", "the probe process ended with exit code 7"),
    ],
)
def test_a_gpu_that_another_process_cannot_open_is_no_backends_fault(device, message, child):
    child()
    with pytest.raises(ProbeError, match=message) as error:
        probe_in_child(device, None, torch.float32, [("works", SHAPE)])
    assert error.value.found == {}


def test_a_process_that_cannot_be_started_is_an_error_with_the_reason(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(ProbeError, match=r"the probe process cannot be started, .*/nowhere/python"):
        probe_in_child("cpu", None, torch.float32, [("works", SHAPE)])


def test_a_child_does_not_outlive_its_parent(tmp_path):
    """Which may be killed while a kernel hangs: the GPU would stay taken."""
    code = f"""import os, time
from pathlib import Path
from fastmae.model.attention import probe_process
probe_process._PROGRAM = ("-m", "tests.support.probed")
child = probe_process._Child({{"device": "cpu", "index": None, "dtype": "float32", "pairs": [["hangs", [1, 1, 1, 8]]]}})
assert child.message(20) == {{"opened": True}} and child.message(20) == {{"begin": 0}}
Path({str(tmp_path / "pid")!r}).write_text(str(child._process.pid))
time.sleep(1000)"""
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[2])
    file = tmp_path / "pid"
    assert wait_until(lambda: file.exists() and file.read_text(), 20)
    pid = int(file.read_text())
    assert is_alive(pid)
    parent.kill()
    parent.wait()
    try:
        assert wait_until(lambda: not is_alive(pid))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def test_ctrl_c_does_not_reach_a_child(child):
    """Or the backend that was being tried would be taken for one that crashes."""
    child()
    with probe_process._Child({"device": "cpu", "index": None, "dtype": "float32", "pairs": []}) as one:
        assert os.getsid(one._process.pid) == one._process.pid != os.getsid(0)


def test_torchs_own_backends_in_a_child_that_one_of_them_aborts(child):
    started = child("torch")
    pairs = [(name, Shape(7, 9, 2, 16)) for name in ("math", "flash", "sdpa", "cudnn")]
    found = [verdict.reason for verdict in probe_in_child("cpu", None, torch.float32, pairs).values()]
    assert found[0] is None and len(started) == 2
    assert found[1].startswith("crashed: the probe process ended with SIGABRT")
    assert found[2] == "differs from math attention by 0.1 of its norm"
    assert found[3].startswith("RuntimeError: No viable backend for scaled_dot_product_attention")


@pytest.mark.gpu
def test_an_illegal_access_in_a_child_leaves_this_process_its_gpu(child):
    started = child("torch", answers=120.0)
    torch.ones(1, device="cuda")
    found = probe_in_child("cuda", 0, torch.bfloat16, [(b, SHAPE) for b in ("math", "breaks", "efficient")])
    reasons = [verdict.reason for verdict in found.values()]
    assert reasons[0] is None and "CUDA error" in reasons[1] and reasons[2] is None and len(started) == 2
    assert torch.ones(3, device="cuda").sum().item() == 3


@pytest.mark.gpu
def test_backends_are_probed_before_this_process_opens_the_gpu(tmp_path):
    """As it must be where a GPU takes one process only."""
    code = f"""import torch
from fastmae.model.attention import cache, probe
from fastmae.model.attention.backends import Shape
assert cache.cache_file("cuda")
probe.probe("cuda", torch.bfloat16, [Shape(50, 50, 12, 64), Shape(147, 197, 16, 32)], index=0)
assert not torch._C._cuda_hasPrimaryContext(0), "the GPU has been opened"
assert not probe.notes(), probe.notes()
shape = Shape(50, 50, 12, 64)
print([b for b in {BACKENDS} if probe.why_not(b, "cuda", torch.bfloat16, shape) is None])
assert not torch._C._cuda_hasPrimaryContext(0), "the GPU has been opened"
"""
    environment = {**os.environ, "FASTMAE_CACHE": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert {"sdpa", "efficient", "math"} <= set(eval(done.stdout.splitlines()[-1]))
    assert len(list(tmp_path.glob("attention-*.json"))) == 1
