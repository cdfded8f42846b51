"""What is fused in a block: measured, refused if it is wrong or slow, kept on disk, and nothing else of the process changes."""

import json
import random
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from fastmae.errors import InputError
from fastmae.model.attention import choice as attention_choice
from fastmae.model.attention.backends import Shape
from fastmae.model.attention.cache import BLOCKS, PROBES, cache_file
from fastmae.model.attention.choice import unmeasured
from fastmae.model.attention.trial import Verdict
from fastmae.model.block import choice, fused, measured, probe, trial
from fastmae.model.block.block import Block
from fastmae.model.block.choice import BlockShape, fused_names
from fastmae.model.block.measured import BlockTask, Found, Variant, choose_block, known_block, measure_block
from fastmae.model.block.trial import TRIED, try_out

FP32, BF16 = torch.float32, torch.bfloat16
SHAPE = BlockShape(5, 2, 16, 2, 24)
TASK = BlockTask("cpu", BF16, FP32, SHAPE, "auto")
ALL = ("linear", "add_norm", "gelu")


@pytest.fixture(autouse=True)
def own_memory(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTMAE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(choice, "_chosen", {})
    monkeypatch.setattr(attention_choice, "_chosen", {})
    monkeypatch.setattr(probe, "_found", {})


@pytest.fixture
def clock(monkeypatch):
    """Nothing is compiled, and the seconds of a call are ``clock``'s of what it fuses, or of its attention."""
    monkeypatch.setattr(torch, "compile", lambda block, dynamic: block)
    monkeypatch.setattr(torch.compiler, "reset", lambda: None)
    monkeypatch.setattr(attention_choice, "measure", lambda *_: {"short": 1.0, "math": 2.0})
    seconds = {"linear": 0.8, "add_norm": 0.7, "gelu": 1.2, "short": 0.9}
    honest = trial.Trial.run

    def run(self, variant, is_compiled):
        pass_ = partial(honest(self, variant, is_compiled))
        pass_.variant = variant
        return pass_

    def timed(pass_, device_type, calls):
        cost = 1.0
        for name in (pass_.variant.attention, *pass_.variant.fused):
            cost *= seconds.get(name, 1.0)
        return cost

    monkeypatch.setattr(trial.Trial, "run", run)
    monkeypatch.setattr(measured, "seconds", timed)
    return seconds


def test_what_is_faster_is_taken_one_after_the_other_and_why_the_rest_is_not_is_kept(clock):
    found = measure_block(TASK, tokens=15)
    assert found.best == Variant("short", ("linear", "add_norm"))
    # Our own attention is no one's start, although it is the fastest by itself: it is measured as a part of the block.
    assert list(found.microseconds) == ["attention math", "attention math + linear", "attention math + linear + add_norm",
                                        "attention math + linear + add_norm + gelu", str(found.best)]  # fmt: skip
    assert found.microseconds["attention math"] == 1e6
    assert found.rejected == {
        "attention math + linear + add_norm + gelu": "takes 1.200 of the time of attention math + linear + add_norm"
    }


def test_a_difference_that_may_be_noise_takes_nothing(clock):
    clock.update(linear=0.995, add_norm=0.991, gelu=1.0, short=0.999)
    assert measure_block(TASK, tokens=15).best == Variant("math")


def test_an_attention_asked_for_by_name_stays(clock, monkeypatch):
    asked = []
    monkeypatch.setattr(measured, "probe_blocks", lambda *place: asked.append(place[-1]))
    assert measure_block(TASK._replace(attention="sdpa"), tokens=15).best == Variant("sdpa", ("linear", "add_norm"))
    assert measure_block(TASK._replace(attention="short"), tokens=15).best == Variant("short", ("linear", "add_norm"))
    assert asked == [ALL, (*ALL, "short")]


def test_without_autocast_there_is_nothing_to_cast(clock):
    assert measure_block(TASK._replace(dtype=FP32), tokens=15).best == Variant("short", ("add_norm",))


class Scaled(torch.autograd.Function):
    """A gradient that is 4% too large."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return 1.04 * grad


WRONG = {
    "gelu": lambda x, bias: F.gelu(x, approximate="tanh") * 1.05 + 0 * bias.sum(),
    "gelu's bias": lambda x, bias: F.gelu(x) + 0 * bias.sum(),
    "gelu's gradient": lambda x, bias: fused_gelu(Scaled.apply(x), bias),
    "gelu, NaN": lambda x, bias: fused_gelu(x, bias) * torch.nan,
    "add_norm's bias": lambda x, branch, weight, bias, *rest: add_norm(x, branch, weight, 0 * bias, *rest),
    "add_norm's scale": lambda x, branch, weight, bias, *rest: add_norm(x, branch, 0 * weight + 1, bias, *rest),
    "add_norm's branch": lambda x, branch, *rest: add_norm(x, branch * 1.05, *rest),
}
fused_gelu, add_norm = fused.gelu, fused.add_norm


@pytest.mark.parametrize("fault", WRONG)
def test_what_computes_something_else_is_not_taken(fault, clock, monkeypatch):
    name = fault.partition(",")[0].partition("'")[0]
    monkeypatch.setattr(fused, name, WRONG[fault])
    clock.update(dict.fromkeys(ALL, 0.5))
    found = measure_block(TASK, tokens=15)
    assert set(found.best.fused) == set(ALL) - {name}
    (reason,) = found.rejected.values()
    assert reason.startswith("ArithmeticError: ") and "differs from the plain block's by " in reason
    assert name not in " ".join(found.microseconds)
    # A child process finds it too.
    verdict = try_out(name, "cpu", BF16, FP32, SHAPE)
    assert "differs from the plain block's by" in verdict.reason and verdict.lasts


def test_what_raises_is_not_taken(clock, monkeypatch):
    def broken(*_):
        raise RuntimeError("PassManager::run failed\nat line 3")

    monkeypatch.setattr(fused, "gelu", broken)
    found = measure_block(TASK, tokens=15)
    assert found.best == Variant("short", ("linear", "add_norm"))
    assert found.rejected == {"attention math + linear + add_norm + gelu": "RuntimeError: PassManager::run failed at line 3"}


def test_where_nothing_compiles_nothing_is_fused(clock, monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("no C compiler")

    monkeypatch.setattr(torch, "compile", refuse)
    found = choose_block(TASK)
    assert found.best == Variant("math") and fused_names("auto", *TASK[:4]) == ()
    assert found.failure == "RuntimeError: no C compiler"
    assert known_block(TASK) is None  # the next start tries again


def test_a_lack_of_memory_is_not_kept(clock, monkeypatch):
    def run_out(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(fused, "gelu", run_out)
    assert choose_block(TASK).best.fused == ("linear", "add_norm") and known_block(TASK) is None


def test_what_breaks_the_gpu_at_full_size_ends_the_run_and_is_not_tried_again(clock, monkeypatch):
    def break_it(*_):
        monkeypatch.setattr(measured, "answers", lambda _: False)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(fused, "gelu", break_it)
    with pytest.raises(InputError, match=r"^attention math \+ linear \+ add_norm \+ gelu broke the GPU's context while"):
        choose_block(TASK)
    kept = json.loads(cache_file("cpu").read_text())
    reason = "RuntimeError: CUDA error: an illegal memory access was encountered"
    assert list(kept[PROBES].values()) == [{"gelu": reason}] and kept[BLOCKS] == {}


@pytest.mark.parametrize("name", TRIED)
@pytest.mark.parametrize("shape", [SHAPE, BlockShape(4, 0, 16, 2, 24)])
def test_what_is_right_works(name, shape):
    for dtype, residual in ((BF16, FP32), (BF16, BF16), (FP32, FP32)):
        assert try_out(name, "cpu", dtype, residual, shape) == Verdict(None)


def test_a_choice_is_kept_for_the_next_process(clock, monkeypatch):
    chosen = choose_block(TASK).best
    place = "cpu", BF16, FP32, SHAPE
    assert fused_names("auto", *place) == chosen.fused == ("linear", "add_norm")
    assert attention_choice.fastest("cpu", BF16, Shape(3, 5, 2, 8)) == "short"
    kept = json.loads(cache_file("cpu").read_text())
    assert {"triton", "sources"} <= kept.keys()
    entry = kept[BLOCKS]["torch.bfloat16, residual torch.float32, attention auto, compiled: "
                         "5 tokens, those from 2 on attend, 2 heads, width 16, MLP 24"]  # fmt: skip
    assert (
        entry["best"] == ["short", ["linear", "add_norm"]] and len(entry["microseconds"]) == 5 and len(entry["rejected"]) == 1
    )

    monkeypatch.setattr(choice, "_chosen", {})
    monkeypatch.setattr(attention_choice, "_chosen", {})
    monkeypatch.setattr(measured, "measure_block", lambda task: pytest.fail("measured again"))
    assert fused_names("auto", *place) == ()
    assert choose_block(TASK) == Found(chosen, {}, {})
    assert fused_names("auto", *place) == chosen.fused and fused_names("off", *place) == ()
    assert attention_choice.fastest("cpu", BF16, Shape(3, 5, 2, 8)) == "short"
    assert known_block(TASK._replace(residual=BF16)) is known_block(TASK._replace(is_compiled=False)) is None
    assert known_block(TASK._replace(attention="math")) is None


DAMAGED = [3, [], {}, {"best": 3}, {"best": ["math"]}, {"best": [["math"], []]}, {"best": ["math", "linear"]},
           {"best": ["math", ["abacus"]]}, {"best": ["abacus", []]}, {"best": ["math", [["linear"]]]},
           {"best": ["xformers", ["linear"]]}]  # fmt: skip


@pytest.mark.parametrize("entry", DAMAGED)
def test_a_damaged_entry_is_measured_again_and_replaced(entry, monkeypatch):
    found = Variant("short", ("linear", "add_norm"))
    monkeypatch.setattr(measured, "measure_block", lambda task: Found(found, {}, {}))
    cache_file("cpu").parent.mkdir()
    cache_file("cpu").write_text(json.dumps({BLOCKS: {TASK.key: entry}}))
    assert known_block(TASK) is None
    assert choose_block(TASK).best == known_block(TASK) == found


def test_other_sources_or_another_triton_are_measured_again(clock, monkeypatch):
    choose_block(TASK)
    monkeypatch.setattr("fastmae.model.attention.cache._sources", lambda: "others")
    assert known_block(TASK) is None
    monkeypatch.undo()
    monkeypatch.setattr("triton.__version__", "9.9")
    assert known_block(TASK) is None


def test_nothing_is_measured_within_unmeasured(monkeypatch):
    monkeypatch.setattr(measured, "measure_block", lambda task: pytest.fail("measured"))
    with unmeasured():
        assert choose_block(TASK).best == Variant("auto") and fused_names("auto", "cpu", BF16, FP32, SHAPE) == ()
    assert not cache_file("cpu").exists()


@pytest.mark.all
def test_a_measurement_compiles_and_leaves_this_process_as_it_was(monkeypatch):
    """Random state, gradients' mode, and what torch's compiler keeps."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager", fullgraph=True))
    monkeypatch.setattr(measured, "_LEAST", 10)  # everything is taken
    monkeypatch.setattr(measured, "_ROUNDS", 1)
    monkeypatch.setattr(measured, "_CALLS", 1)
    torch.manual_seed(3)
    random.seed(3)
    before = torch.random.get_rng_state(), random.getstate()
    with torch.no_grad():
        found = measure_block(TASK._replace(attention="short"), tokens=15)
        assert not torch.is_grad_enabled()
    assert found.rejected == {} and found.best == Variant("short", ALL) and min(found.microseconds.values()) > 0
    assert torch.equal(before[0], torch.random.get_rng_state()) and before[1] == random.getstate()
    from torch._dynamo.eval_frame import _debug_get_cache_entry_list

    assert _debug_get_cache_entry_list(Block.forward.__code__) == []


@pytest.mark.gpu
@pytest.mark.worth(2)
def test_on_a_gpu_all_is_right_and_its_memory_is_given_back():
    task = BlockTask("cuda", BF16, FP32, BlockShape(50, 0, 128, 2, 512), "auto")
    before = torch.cuda.memory_allocated(), torch.cuda.get_rng_state()
    chosen = choose_block(task).best
    assert chosen == known_block(task) and fused_names("auto", *task[:4]) == chosen.fused
    entry = json.loads(cache_file("cuda").read_text())[BLOCKS][task.key]
    assert all(reason.startswith("takes ") for reason in entry["rejected"].values()), entry["rejected"]
    assert len(entry["microseconds"]) == 5
    assert torch.cuda.memory_allocated() < before[0] + (64 << 20)  # workspaces of cuBLAS stay
    assert torch.equal(torch.cuda.get_rng_state(), before[1])
