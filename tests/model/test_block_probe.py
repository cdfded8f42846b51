"""What a block may fuse is tried in a child process first, on a GPU, and a crash there is its verdict."""

import pytest
import torch

from fastmae.model.attention.cache import cache_file
from fastmae.model.attention.probe_process import ProbeError, probe_in_child
from fastmae.model.attention.trial import Verdict
from fastmae.model.block import measured, probe
from fastmae.model.block.choice import BlockShape
from fastmae.model.block.measured import BlockTask, Variant
from fastmae.model.block.trial import TRIED
from fastmae.model.config import FUSED as ALL

FP32, BF16 = torch.float32, torch.bfloat16
SHAPE = BlockShape(5, 2, 16, 2, 24)
TASK = BlockTask("cpu", BF16, FP32, SHAPE, "auto")


@pytest.fixture(autouse=True)
def own_memory(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTMAE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(probe, "_found", {})


@pytest.fixture
def gpu(monkeypatch):
    """A GPU that is described. What is asked of a child is returned; ``gpu.verdicts`` are its answers."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Described GPU")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)

    class Asked(list):
        def __init__(self):
            self.verdicts = {}

    asked = Asked()

    def child(device, index, dtype, pairs, program):
        asked.append((device, index, dtype, pairs, program))
        return {pair: asked.verdicts.get(pair[0], Verdict(None)) for pair in pairs}

    monkeypatch.setattr(probe, "probe_in_child", child)
    return asked


def test_on_a_gpu_a_child_tries_first_what_might_crash(gpu, monkeypatch):
    gpu.verdicts = {"gelu": Verdict("crashed"), "short": Verdict("killed", lasts=False)}
    task = TASK._replace(device_type="cuda")
    probe.probe_blocks(*task[:3], [SHAPE], index=1)
    assert gpu == [("cuda", 1, BF16, [(name, (*SHAPE, "float32")) for name in TRIED], "fastmae.model.block.probe")]
    monkeypatch.setattr(measured, "why_not", lambda *_: None)
    assert task.why_not(Variant("math", ALL)) == "crashed" and task.why_not(Variant("short")) == "killed"
    assert task.why_not(Variant("math", ALL[:2])) is None
    monkeypatch.setattr(probe, "_found", {})  # another process
    probe.probe_blocks(*task[:3], [SHAPE])
    assert gpu[1:] == [("cuda", 0, BF16, [("short", (*SHAPE, "float32"))], "fastmae.model.block.probe")]
    assert task.why_not(Variant("math", ALL)) == "crashed"
    probe.probe_blocks(*task[:3], [SHAPE])
    probe.probe_blocks("cpu", BF16, FP32, [SHAPE])
    assert len(gpu) == 2
    probe.keep_fault("linear", *task[:4], "illegal memory access")
    monkeypatch.setattr(probe, "_found", {})
    probe.probe_blocks(*task[:3], [SHAPE], ("linear", "add_norm", "gelu"))
    found = [probe.why_not_fused(name, *task[:4]) for name in ALL]
    assert found == ["illegal memory access", None, "crashed"] and len(gpu) == 2


def test_where_no_child_can_open_the_gpu_the_measurement_finds_out(gpu, monkeypatch):
    def refuse(*_):
        error = ProbeError("busy")
        error.found = {}
        raise error

    monkeypatch.setattr(probe, "probe_in_child", refuse)
    probe.probe_blocks("cuda", BF16, FP32, [SHAPE])
    assert probe.why_not_fused("gelu", "cuda", BF16, FP32, SHAPE) is None and not cache_file("cuda").exists()


@pytest.mark.all  # attention's own child is tried in every run
def test_a_child_tries_a_block():
    pairs = [(name, (*SHAPE, "float32")) for name in TRIED] + [("abacus", (*SHAPE, "float32"))]
    found = list(probe_in_child("cpu", None, BF16, pairs, "fastmae.model.block.probe").values())
    assert found[:-1] == [Verdict(None)] * len(TRIED) and "abacus" in found[-1].reason
