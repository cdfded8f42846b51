"""Compiled gradients against eager ones: a wrong one is found and named, and nothing is timed beside it."""

import json
from functools import partial
from unittest.mock import MagicMock, Mock

import pytest
import torch
import torch.nn.functional as F

from fastmae.benchmarks.cli import main
from fastmae.benchmarks.timing import LossesDiffer, Times
from fastmae.benchmarks.training import gradients, step
from fastmae.benchmarks.training.gradients import measure_gradients, wrong_parameters
from fastmae.benchmarks.training.photographs import generated, photographs
from fastmae.model.config import PRESETS, preset
from fastmae.model.mae import MAE

CPU = torch.device("cpu")
WORST = "blocks.0.norm1.weight"


@pytest.fixture
def shallow(monkeypatch):
    """A model of two blocks, of both kinds."""
    monkeypatch.setitem(PRESETS, "tiny", {**PRESETS["tiny"], "depth": 1, "decoder_depth": 1})


@pytest.fixture
def quick(shallow, monkeypatch):
    """Compiled by what traces and does not generate code, in place of Inductor."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    return {"image_size": 32, "modes": ["model"], "mix_orders": [True], "fused": ["auto"]}


def spoil(monkeypatch, change):
    """Let the compiled gradient of one LayerNorm's scale be ``change`` of what it is."""
    honest = gradients.compiled

    def wrong(module, how):
        if how != "off":
            dict(module.model.named_parameters())[WORST].register_hook(change)
        return honest(module, how)

    monkeypatch.setattr(gradients, "compiled", wrong)


def test_a_wrong_gradient_is_named_and_ends_the_command(quick, monkeypatch, capsys):
    spoil(monkeypatch, lambda gradient: 1.03 * gradient)
    monkeypatch.setattr(gradients, "measure_gradients", lambda *args, **more: measure_gradients(*args, **{**more, **quick}))
    assert main(["gradients", "--device", "cpu", "--model", "tiny", "--batch", "2"]) == 1
    out, error = capsys.readouterr()
    (line,) = error.splitlines()  # all others are right
    assert line.startswith(f"fastmae bench: --compile model, mix-order reduction on: {WORST} has a relative error of")
    (section,) = json.loads(out.splitlines()[-1]).values()
    (row,) = section["rows"]
    trained = {name for name, p in MAE(preset("tiny")).named_parameters() if p.requires_grad}
    assert row["wrong"] == 1 and row["errors"].keys() == section["eager_errors"].keys() == trained
    assert all(0 < error < 0.03 for error in section["eager_errors"].values())  # of bf16, and of nothing else


def test_a_wrong_fused_operation_is_named(quick, monkeypatch):
    """Whether a run would have chosen it or not."""
    monkeypatch.setattr("fastmae.model.block.fused.gelu", lambda x, bias: F.gelu(x) + 0 * bias.sum())  # ignores its bias
    found = measure_gradients("tiny", 2, CPU, **{**quick, "fused": ["all"]})
    assert [row["fused"] for row in found["rows"]] == ["all"] and len(found["wrong"]) == 2  # one a block, and no other
    assert all("everything fused: " in line and "mlp.fc1.bias has a relative error of" in line for line in found["wrong"])


def test_nothing_is_timed_beside_wrong_gradients(monkeypatch):
    asked = []

    def measure(name, batch, device, **more):
        asked.append((name, batch, more["image_size"], more["modes"]))
        return {"wrong": [f"{WORST} is off by 1"]}

    chosen = []
    monkeypatch.setattr(step, "choose", lambda config, device, compile: chosen.append((device.type, compile)))
    monkeypatch.setattr(gradients, "measure_gradients", measure)
    monkeypatch.setattr(step, "matmul_flops", lambda device: 1e12)
    monkeypatch.setattr(step, "datasheet_flops", lambda device: 1e12)
    monkeypatch.setattr(step, "Worker", MagicMock())  # which compile meanwhile
    monkeypatch.setattr(step, "take_turns", lambda *a: pytest.fail("was timed"))
    with pytest.raises(LossesDiffer, match=rf"1 compiled gradients of tiny are wrong, .*: {WORST} is off by 1"):
        step.measure_steps(["tiny"], [48], torch.device("cuda"), image_size=64, compile="blocks")
    assert asked == [("tiny", 48, 64, ["blocks"])] and chosen == [("cuda", "blocks")]


def test_gradients_that_did_not_fit_beside_the_others_are_compared_once_these_have_freed_their_memory(monkeypatch):
    told = [["out of memory"], []]
    monkeypatch.setattr(step, "choose", Mock())
    monkeypatch.setattr(step, "check_gradients", Mock(side_effect=told))
    monkeypatch.setattr(step, "matmul_flops", lambda device: 1e12)
    monkeypatch.setattr(step, "datasheet_flops", lambda device: 1e12)
    monkeypatch.setattr(step, "Worker", MagicMock())
    monkeypatch.setattr(step, "losses_of", lambda workers, seed: dict.fromkeys(workers, (1.0, 1.0)))
    monkeypatch.setattr(step, "take_turns", lambda workers, *a: dict.fromkeys(workers, Times((1.0,))))
    monkeypatch.setattr(step, "_row", lambda name, *a: {"model": "tiny", "batch": 8, "contender": name})
    found = step.measure_steps(["tiny"], [8], torch.device("cuda"), image_size=64)
    assert step.check_gradients.call_count == 2 and len(found["rows"]) == 3 and len(found["notes"]) == 1


def test_gradients_that_do_not_fit_into_memory_are_said_not_to_be_compared(monkeypatch):
    monkeypatch.setattr(gradients, "measure_gradients", Mock(side_effect=torch.OutOfMemoryError))
    (note,) = gradients.check_gradients("huge", 512, CPU, image_size=224, mode="model")
    assert "huge at batch 512 were not compared" in note


@pytest.mark.parametrize("change", [lambda g: 1.03 * g, lambda g: g.roll(1), lambda g: 0 * g, lambda g: torch.nan * g],
                         ids=["3% too large", "rows moved", "zero", "NaN"])  # fmt: skip
def test_a_gradient_that_is_wrong_in_any_way_is_found(change):
    exact = {"a": torch.randn(50), "b": torch.randn(7, 9)}
    rounded = {name: g.bfloat16().float() for name, g in exact.items()}
    eager = gradients.errors(rounded, exact)
    assert wrong_parameters(eager, eager) == [] and wrong_parameters(gradients.errors(exact, exact), eager) == []
    (line,) = wrong_parameters(gradients.errors({**rounded, "b": change(rounded["b"])}, exact), eager)
    assert line.startswith("b has a relative error of ")


def test_a_gradient_may_be_twice_as_far_off_as_eager_mode_and_one_rounding():
    eager = {"a": 0.01, "b": 0.0}
    limit = {"a": 0.02 + 2**-9, "b": 2**-9}
    assert wrong_parameters(limit, eager) == []
    for name in limit:
        (line,) = wrong_parameters({**limit, name: 1.001 * limit[name]}, eager)
        assert line.startswith(name)


@pytest.mark.parametrize("broken", [0.6, float("inf"), float("nan")])
def test_a_gradient_of_zero_is_wrong_beside_an_eager_one_that_is_wrong_too(broken):
    (line,) = wrong_parameters({"a": 1.0}, {"a": broken})
    assert line.startswith("a has a relative error of 1")


def test_gradients_that_are_missing_are_wrong_and_those_of_nothing_are_right():
    some, none = torch.ones(3), torch.zeros(3)
    assert gradients.errors({"a": None}, {"a": some}) == gradients.errors({"a": some}, {"a": None}) == {"a": float("inf")}
    assert gradients.errors({"a": none}, {"a": none}) == gradients.errors({"a": None}, {"a": None}) == {"a": 0.0}
    assert gradients.errors({"a": some}, {"a": none}) == {"a": float("inf")}
    with pytest.raises(ValueError, match=r"other parameters: \['b'\]"):
        gradients.errors({"a": some, "b": some}, {"a": some})


def test_photographs_come_from_shards_from_packages_or_are_generated(shard_folder, shallow, monkeypatch):
    model = MAE(preset("tiny", img_size=32))
    images, source = photographs(model, 40, shard_folder)
    assert images.shape == (40, 3, 32, 32) and source == f"37 images of {shard_folder.name}"
    assert torch.equal(images[0], images[37]) and not torch.equal(images[0], images[1])

    monkeypatch.setattr("fastmae.images.photographs._PHOTOGRAPHS", ())
    images, source = photographs(model, 5)
    assert source.startswith("generated images, because ") and torch.equal(images, generated(3, (32, 32), 5))
    neighbours = (images[..., 1:].float() - images[..., :-1].float()).abs().mean()
    assert images.dtype == torch.uint8 and 2 < neighbours < images.float().std()  # neither noise nor flat


def test_bundled_photographs_are_cropped_the_same_way_each_time(shallow):
    pytest.importorskip("skimage")
    model = MAE(preset("tiny", img_size=32))
    images, source = photographs(model, 12)
    assert torch.equal(images, photographs(model, 12)[0]) and source.startswith("12 crops of ")
    assert not torch.equal(images[0], images[10])  # of one photograph


@pytest.mark.all
@pytest.mark.parametrize("mode", ["model", "blocks"])
def test_inductor_keeps_gradients_on_a_cpu(mode, shallow):
    section = measure_gradients("tiny", 4, CPU, image_size=64, modes=[mode], mix_orders=[True])
    assert section["wrong"] == []


@pytest.mark.gpu
@pytest.mark.worth(1)
def test_inductor_keeps_gradients_on_a_gpu_with_and_without_mix_order_reduction(monkeypatch):
    monkeypatch.setitem(PRESETS, "base", {**PRESETS["base"], "depth": 2, "decoder_depth": 2})
    from torch._inductor import config as inductor

    monkeypatch.setattr(gradients, "choose", Mock())  # nothing is fused unless it is named
    with inductor.patch(force_disable_caches=True):  # a cached graph would not be counted
        section = measure_gradients("base", 160, torch.device("cuda"))
    assert section["wrong"] == []
    for row in section["rows"]:
        assert (row["mix_order_kernels"] > 0) == (row["mix_order"] and row["fused"] == "auto"), (row["compile"], row["fused"])
