"""Which backends work: tried on the run's own shapes, apart from this process where there is a GPU, and remembered."""

import json
from unittest import mock

import pytest
import torch

from fastmae.model.attention import cache, probe, trial
from fastmae.model.attention.backends import Shape
from fastmae.model.attention.probe import notes, why_not
from fastmae.model.attention.probe_process import ProbeError
from fastmae.model.attention.trial import Verdict, try_out
from fastmae.model.config import BACKENDS

pytestmark = pytest.mark.worth(2)

SHAPES = [Shape(50, 50, 12, 64), Shape(256, 256, 16, 32)]
DTYPE = torch.bfloat16


@pytest.fixture(autouse=True)
def own_memory(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTMAE_CACHE", str(tmp_path))
    monkeypatch.setattr(probe, "_found", {})
    monkeypatch.setattr(probe, "_in_process", set())


@pytest.fixture
def gpu(monkeypatch):
    """A GPU that is described. What is asked of other processes is returned; ``gpu.verdicts`` are their answers."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Described GPU")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: pytest.fail("this process opens the GPU"))
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91002)
    monkeypatch.setattr(torch.version, "cuda", "12.8")

    class Asked(list):
        def __init__(self):
            self.verdicts = {}

    asked = Asked()

    def probe_in_child(device, index, dtype, pairs):
        asked.append((device, index, dtype, pairs))
        return {pair: asked.verdicts.get(pair[0], Verdict(None)) for pair in pairs}

    monkeypatch.setattr(probe, "probe_in_child", probe_in_child)
    return asked


def another_process(monkeypatch):
    monkeypatch.setattr(probe, "_found", {})


def test_one_child_tries_all_backends_on_all_shapes_once(gpu, monkeypatch):
    gpu.verdicts = {"xformers": Verdict("crashed"), "flash": Verdict("out of memory", lasts=False)}
    probe.probe("cuda", DTYPE, SHAPES, index=2)
    # cuDNN 9.10.2 is not even tried on 50 tokens.
    wanted = [(b, s) for s in SHAPES for b in BACKENDS if (b, s) != ("cudnn", SHAPES[0])]
    assert gpu == [("cuda", 2, DTYPE, wanted)]
    assert why_not("xformers", "cuda", DTYPE, SHAPES[0]) == "crashed" and why_not("math", "cuda", DTYPE, SHAPES[1]) is None
    assert "cuDNN 9.10.2 reads out of bounds" in why_not("cudnn", "cuda", DTYPE, SHAPES[0])
    assert why_not("cudnn", "cuda", DTYPE, SHAPES[1]) is None
    assert len(gpu) == 1
    another_process(monkeypatch)
    probe.probe("cuda", DTYPE, SHAPES)
    # What was cached is not tried again; what is no fault of the backend was not cached.
    assert gpu[1:] == [("cuda", 0, DTYPE, [("flash", s) for s in SHAPES])]
    assert why_not("xformers", "cuda", DTYPE, SHAPES[0]) == "crashed"
    kept = json.loads(cache.cache_file("cuda").read_text())
    assert (kept["device"], kept["cudnn"]) == ("Described GPU", "(9, 10, 2)")
    assert kept["probes"][f"torch.bfloat16: {SHAPES[0]}"] == {"short": None, "xformers": "crashed", "sdpa": None,
                                                              "efficient": None, "math": None}  # fmt: skip


def test_another_cudnn_is_probed_again(gpu, monkeypatch):
    probe.probe("cuda", DTYPE, SHAPES)
    another_process(monkeypatch)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)
    probe.probe("cuda", DTYPE, SHAPES)
    assert gpu[1][3] == [(b, s) for s in SHAPES for b in BACKENDS]


@pytest.mark.parametrize("probes", [3, {"torch.bfloat16: %s": 7}, {"torch.bfloat16: %s": {"math": 1, "sdpa": ["x"]}}])
def test_a_damaged_cache_is_probed_again(probes, gpu):
    path = cache.cache_file("cuda")
    path.write_text(json.dumps({"probes": probes}).replace("%s", str(SHAPES[1])))
    probe.probe("cuda", DTYPE, SHAPES[1:], ("math", "sdpa"))
    assert gpu == [("cuda", 0, DTYPE, [("math", SHAPES[1]), ("sdpa", SHAPES[1])])]
    assert json.loads(path.read_text())["probes"][f"torch.bfloat16: {SHAPES[1]}"] == {"math": None, "sdpa": None}


def test_where_no_child_can_open_the_gpu_this_process_tries_the_rest_and_notes_it(gpu, monkeypatch):
    tried = []

    def refuse(*_):
        error = ProbeError("the probe process cannot open the GPU, it is busy")
        error.found = {("sdpa", SHAPES[1]): Verdict("crashed")}
        raise error

    monkeypatch.setattr(probe, "probe_in_child", refuse)
    monkeypatch.setattr(probe, "try_out", lambda *place: tried.append(place) or Verdict(None))
    probe.probe("cuda", DTYPE, SHAPES[1:], ("sdpa", "math"))
    assert tried == [("math", "cuda", DTYPE, SHAPES[1])]
    assert why_not("sdpa", "cuda", DTYPE, SHAPES[1]) == "crashed"
    assert notes() == ["attention backends were probed in this process: the probe process cannot open the GPU, it is busy"]
    assert set(json.loads(cache.cache_file("cuda").read_text())["probes"][f"torch.bfloat16: {SHAPES[1]}"]) == {"sdpa"}


def test_on_the_cpu_no_process_is_started(monkeypatch):
    monkeypatch.setattr(probe, "probe_in_child", lambda *_: pytest.fail("a process for the CPU"))
    probe.probe("cpu", torch.float32, [Shape(7, 9, 2, 16)])
    assert why_not("math", "cpu", torch.float32, Shape(7, 9, 2, 16)) is None and notes() == []


@pytest.mark.parametrize(
    ("factor", "reason"), [(1.1, "by 0.1 of its norm"), (float("nan"), "by inf of its norm"), (1 + 1e-4, None)]
)
def test_a_backend_that_computes_something_else_does_not_work(factor, reason, monkeypatch):
    genuine = trial.attend
    monkeypatch.setattr(trial, "attend", lambda *a: genuine(*a) * (factor if a[2] == "sdpa" else 1))
    for shape in (Shape(7, 9, 2, 16), Shape(5, 5, 2, 8)):
        found = try_out("sdpa", "cpu", torch.float32, shape)
        assert found == Verdict(reason and f"differs from math attention {reason}")


def test_wrong_gradients_are_found_too(monkeypatch):
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q):
            return q.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * 1.2

    genuine = trial.attend
    monkeypatch.setattr(trial, "attend", lambda kv, q, b: genuine(kv, Wrong.apply(q) if b == "sdpa" else q, b))
    assert "differs from math" in try_out("sdpa", "cpu", torch.float32, Shape(7, 9, 2, 16)).reason


@pytest.mark.parametrize("shape", [Shape(1, 1, 1, 8), Shape(3, 1, 2, 8), Shape(65, 65, 2, 80)])
def test_shapes_at_the_edge_are_compared_fairly(shape):
    assert try_out("math", "cpu", torch.float32, shape) == try_out("sdpa", "cpu", torch.float32, shape) == Verdict(None)


def test_long_sequences_are_compared_on_the_heads_that_fit(monkeypatch):
    shapes, genuine = [], trial.attend
    monkeypatch.setattr(trial, "_COMPARED", 2 * 2 * 9 * 9)
    monkeypatch.setattr(trial, "attend", lambda *a: shapes.append((a[2], a[0].shape[3])) or genuine(*a))
    assert try_out("sdpa", "cpu", torch.float32, Shape(9, 9, 5, 8)) == Verdict(None)
    assert shapes == [("sdpa", 5), ("math", 2)]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory.\n Tried to allocate 2 GiB"),
        RuntimeError("CUDA error:\n out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED\n when calling `cublasCreate(handle)`"),
    ],
)
def test_a_lack_of_memory_is_not_cached(error, monkeypatch):
    def run_out(*_):
        raise error

    monkeypatch.setattr(trial, "attend", run_out)
    reason = f"{type(error).__name__}: {error}".replace("\n", "")
    assert try_out("sdpa", "cpu", torch.float32, SHAPES[0]) == Verdict(reason, lasts=False)


def test_a_full_device_answers_and_a_broken_one_does_not(monkeypatch):
    for error, expected in ((torch.OutOfMemoryError("CUDA out of memory"), True), (RuntimeError("CUDA error"), False)):
        monkeypatch.setattr(torch, "ones", mock.Mock(side_effect=error))
        assert trial.answers("cpu") == expected


def test_where_nothing_works_nothing_is_cached_for_other_machines(gpu):
    gpu.verdicts = {b: Verdict("CUDA error: uncorrectable ECC error encountered") for b in BACKENDS}
    probe.probe("cuda", DTYPE, SHAPES[1:])
    assert "ECC" in why_not("sdpa", "cuda", DTYPE, SHAPES[1])
    assert json.loads(cache.cache_file("cuda").read_text())["probes"] == {}
