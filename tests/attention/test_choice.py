"""The choice of an attention backend: measured, kept, shared between processes, and never in the way."""

import json
import os

import pytest
import torch

from fastmae.model.attention import choice
from fastmae.model.attention.backends import Shape
from fastmae.model.attention.cache import BLOCKS, cache_file, read_entries, write_entries
from fastmae.model.attention.choice import adopt, fastest, measure, unmeasured
from fastmae.model.attention.probe import probe, why_not
from fastmae.model.config import BACKENDS
from tests.support.forked import run_together

pytestmark = pytest.mark.worth(2)

SHAPE = Shape(7, 9, 2, 16)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTMAE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(choice, "_chosen", {})


@pytest.mark.parametrize("shape", [SHAPE, Shape(5, 5, 2, 8)])
def test_every_backend_that_works_is_measured_and_no_other(shape, device):
    times = measure(device, torch.float32, shape, tokens=100)
    assert set(times) == {b for b in BACKENDS if why_not(b, device, torch.float32, shape) is None}
    assert list(times.values()) == sorted(times.values()) and min(times.values()) > 0


def test_the_fastest_is_chosen_once_and_kept_in_a_file(monkeypatch):
    calls = []
    monkeypatch.setattr(choice, "measure", lambda *place: calls.append(place) or {"math": 1.0, "sdpa": 2.0})
    assert fastest("cpu", torch.float32, SHAPE) == fastest("cpu", torch.float32, SHAPE) == "math"
    monkeypatch.setattr(choice, "_chosen", {})  # another process
    assert fastest("cpu", torch.float32, SHAPE) == "math"
    assert fastest("cpu", torch.float32, Shape(8, 9, 2, 16)) == "math"
    assert len(calls) == 2
    kept = json.loads(cache_file("cpu").read_text())
    assert kept["torch"] == torch.__version__
    assert kept["choices"][f"torch.float32: {SHAPE}"] == {"backend": "math", "microseconds": {"math": 1.0, "sdpa": 2.0}}


@pytest.mark.parametrize("content", ["", "[]", '{"choices": 3}', '{"choices": {"torch.float32: %s": {"backend": "abacus"}}}'])
def test_a_damaged_file_is_measured_again_and_replaced(content, monkeypatch):
    monkeypatch.setattr(choice, "measure", lambda *_: {"math": 1.0})
    cache_file("cpu").parent.mkdir()
    cache_file("cpu").write_text(content.replace("%s", str(SHAPE)))
    assert fastest("cpu", torch.float32, SHAPE) == "math"
    assert json.loads(cache_file("cpu").read_text())["choices"]


def add_entries(folder, process):
    os.environ["FASTMAE_CACHE"] = str(folder)
    for n in range(10):
        write_entries("cpu", BLOCKS, {f"{process} {n}": {"microseconds": process * [1.0]}})


@pytest.mark.all
def test_processes_that_write_at_once_keep_all_entries(tmp_path):
    run_together(add_entries, [(tmp_path / "cache", process) for process in (1, 20)])
    assert len(read_entries("cpu", BLOCKS)) == 20


def test_a_folder_that_cannot_be_written_costs_only_the_file(tmp_path, monkeypatch):
    (tmp_path / "occupied").write_text("a file where the folder should be")
    monkeypatch.setenv("FASTMAE_CACHE", str(tmp_path / "occupied"))
    monkeypatch.setattr(choice, "measure", lambda *_: {"math": 1.0})
    assert fastest("cpu", torch.float32, SHAPE) == "math"


def test_a_kept_backend_that_no_longer_works_is_not_used(monkeypatch):
    monkeypatch.setattr(choice, "measure", lambda *_: {"xformers": 1.0})
    fastest("cpu", torch.float32, SHAPE)
    monkeypatch.setattr(choice, "_chosen", {})
    monkeypatch.setattr(choice, "measure", lambda *_: {"math": 1.0})
    assert fastest("cpu", torch.float32, SHAPE) == "math"  # xformers works on no CPU


def test_the_choice_of_another_process_is_used():
    adopt("cpu", torch.float32, {SHAPE: "math"})
    assert fastest("cpu", torch.float32, SHAPE) == "math"
    assert not cache_file("cpu").exists()


def test_nothing_is_measured_within_unmeasured(monkeypatch):
    calls = []
    monkeypatch.setattr(choice, "measure", lambda *place: calls.append(place) or {"math": 1.0})
    adopt("cpu", torch.float32, {SHAPE: "flash"})
    with unmeasured():
        assert fastest("cpu", torch.float32, SHAPE) == "flash"
        assert fastest("cpu", torch.float32, Shape(8, 9, 2, 16)) == "sdpa" and calls == []
    assert fastest("cpu", torch.float32, Shape(8, 9, 2, 16)) == "math" and len(calls) == 1


def test_no_home_and_no_user_name_cost_only_the_file(monkeypatch):
    """As of a container that runs as a number."""

    def unknown(uid):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr("pwd.getpwuid", unknown)
    for name in ("HOME", "XDG_CACHE_HOME", "FASTMAE_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(choice, "measure", lambda *_: {"math": 1.0})
    assert cache_file("cpu") is None
    assert fastest("cpu", torch.float32, SHAPE) == "math"


def test_measuring_does_not_use_torchs_generator():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    measure("cpu", torch.float32, SHAPE, tokens=100)
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.gpu
def test_auto_is_never_much_slower_than_the_best():
    shapes = [Shape(50, 50, 12, 64), Shape(197, 197, 16, 32)]
    probe("cuda", torch.bfloat16, shapes)
    for shape in shapes:
        chosen = fastest("cuda", torch.bfloat16, shape)
        times = measure("cuda", torch.bfloat16, shape)
        assert times[chosen] <= 1.1 * min(times.values())  # two measurements of a shared machine; the benchmark is finer
