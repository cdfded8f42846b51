"""What the blocks of a run fuse: measured by rank 0, kept in checkpoints, used again where the run is resumed."""

import json
from dataclasses import asdict, replace

import pytest
import torch

from fastmae.errors import InputError
from fastmae.model.attention import choice as attention_choice
from fastmae.model.attention.backends import Shape
from fastmae.model.block import choice, measured, probe
from fastmae.model.block.choice import BlockShape, fused_names
from fastmae.model.block.measured import Found, Variant
from fastmae.train.checkpoint.format import STATE, Checkpoint
from fastmae.train.distributed.world import World
from fastmae.train.pretrain import fused_choice, pretrain
from fastmae.train.pretrain.attention_choice import choose_attention
from fastmae.train.pretrain.fused_choice import run_block_shapes
from tests.support.runs import RECIPE, assert_same_bits, records, run_of, signal_after

ALONE = World(0, 1, torch.device("cpu"))
ENCODER, LAST = BlockShape(5, 0, 24, 3, 96), BlockShape(17, 5, 16, 2, 64)  # of RECIPE
SHAPES = {ENCODER: Shape(5, 5, 3, 8), LAST: Shape(12, 17, 2, 8)}
FP32 = torch.float32
FUSED = {str(ENCODER): ["add_norm"], str(LAST): ["gelu"]}


def recipe_of(**model):
    return replace(RECIPE, model=replace(RECIPE.model, **model))


@pytest.fixture(autouse=True)
def own_memory(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTMAE_CACHE", str(tmp_path / "cache"))
    for holder, name in ((choice, "_chosen"), (attention_choice, "_chosen"), (probe, "_found")):
        monkeypatch.setattr(holder, name, {})


@pytest.fixture
def blocks(monkeypatch):
    """As on a GPU, blocks are measured: ``blocks.best`` wins. Holds the tasks that were."""

    class Measured(list):
        best = Variant("short", ("add_norm", "gelu"))
        others = {"attention math": 1.0}, {}

    found = Measured()

    def measure_block(task):
        found.append(task)
        best = found.best if task.attention == "auto" else found.best._replace(attention=task.attention)
        return Found(best, *found.others)

    monkeypatch.setattr("fastmae.model.attention.dot_product.MEASURED", ("cpu",))
    monkeypatch.setattr(fused_choice, "MEASURED", ("cpu",))
    monkeypatch.setattr(attention_choice, "measure", lambda *_: {"math": 1.0})
    monkeypatch.setattr(measured, "measure_block", measure_block)
    return found


def checkpoint(folder, recipe=RECIPE, **attention):
    backends = {str(shape): "math" for shape in SHAPES.values()}
    saved = {"device": "cpu", "dtype": "float32", "backends": backends, "fused": FUSED} | attention
    return Checkpoint(folder, {"model": recipe.model.to_json(), "attention": saved})


def fused_now(recipe=RECIPE, dtype=FP32, residual=FP32):
    return {str(s): list(fused_names(recipe.model.fused, "cpu", dtype, residual, s)) for s in run_block_shapes(recipe)}


def test_a_resumed_run_fuses_what_its_checkpoint_says(shard_folder, tmp_path, monkeypatch, blocks, capsys):
    whole = pretrain.pretrain(RECIPE, run_of(shard_folder, tmp_path / "whole"))
    assert [(task.shape, task.attention, task.is_compiled) for task in blocks] == [(s, "auto", True) for s in SHAPES]
    assert "attention short, fused: add_norm, gelu\n" in (said := capsys.readouterr().out)
    assert "blocks were measured for this device, in 0 s\n" in said
    with monkeypatch.context() as patch:
        signal_after(patch, 3)
        first = pretrain.pretrain(RECIPE, run_of(shard_folder, tmp_path / "halves"))
    assert "were measured" not in capsys.readouterr().out and len(blocks) == 2  # known from the disk
    kept = json.loads((first / STATE).read_text())["attention"]
    assert kept["fused"] == {str(s): ["add_norm", "gelu"] for s in SHAPES}
    assert kept["backends"] == {str(s): "short" for s in SHAPES.values()}  # what really ran
    for holder in (choice, attention_choice):  # on another node
        monkeypatch.setattr(holder, "_chosen", {})
    monkeypatch.setenv("FASTMAE_CACHE", str(tmp_path / "elsewhere"))
    blocks.best = Variant("math")
    resumed = pretrain.pretrain(RECIPE, run_of(shard_folder, tmp_path / "halves"))
    assert len(blocks) == 2 and "attention short, fused: add_norm, gelu\n" in capsys.readouterr().out
    assert json.loads((resumed / STATE).read_text())["attention"] == kept
    assert_same_bits(whole, resumed)
    texts = [r["attention"] for r in records(tmp_path / "halves") if r.get("event") == "start"]
    assert texts == ["short, fused: add_norm, gelu"] * 2


def test_blocks_are_measured_at_all_sizes_with_the_runs_dtypes_and_as_it_compiles(blocks):
    recipe = replace(recipe_of(residual="bf16"), progressive=((0.5, (48, 48)),))
    found = choose_attention(recipe, torch.bfloat16, ALONE, compiles=False)
    places = {(task.device_type, task.dtype, task.residual, task.is_compiled) for task in blocks}
    assert places == {("cpu", torch.bfloat16, torch.bfloat16, False)}
    shapes = [ENCODER, LAST, BlockShape(10, 0, 24, 3, 96), BlockShape(37, 10, 16, 2, 64)]
    assert [task.shape for task in blocks] == shapes and list(found.fused) == [str(s) for s in shapes]
    assert fused_now(recipe, torch.bfloat16, torch.bfloat16) == found.fused
    assert fused_now(recipe, torch.bfloat16, FP32) == {shape: [] for shape in found.fused}


def test_attention_asked_for_by_name_is_not_changed_by_the_blocks(blocks):
    found = choose_attention(recipe_of(attention="sdpa"), FP32, ALONE)
    assert set(found.backends.values()) == {"sdpa"} and {task.attention for task in blocks} == {"sdpa"}
    assert found.text == "sdpa, fused: add_norm, gelu"


@pytest.mark.parametrize("saved", [{"dtype": "bfloat16"}, {"device": "cuda"}])
def test_a_choice_for_another_device_or_dtype_is_made_again(saved, tmp_path, blocks):
    found = choose_attention(RECIPE, FP32, ALONE, checkpoint(tmp_path, **saved))
    assert len(blocks) == 2 and found.fused == {str(s): ["add_norm", "gelu"] for s in SHAPES}
    (line,) = [n for n in found.notes if "blocks fuse" in n]
    assert line.startswith(
        "what blocks fuse is chosen again: float32 on cpu, residual fp32, and the checkpoint's was chosen for "
    )


def test_a_choice_for_another_residual_stream_is_made_again(tmp_path, blocks):
    found = choose_attention(recipe_of(residual="bf16"), FP32, ALONE, checkpoint(tmp_path))
    assert len(blocks) == 2 and "the checkpoint's was chosen for float32 on cpu, residual fp32" in found.notes[0]
    assert {task.attention for task in blocks} == {"math"}  # which is the checkpoint's, and works


def test_names_that_are_not_known_here_are_chosen_again(tmp_path, blocks):
    saved = checkpoint(tmp_path, fused={str(ENCODER): ["add_norm", "abacus"], str(LAST): ["gelu"]})
    found = choose_attention(RECIPE, FP32, ALONE, saved)
    assert [task.shape for task in blocks] == [ENCODER]
    assert found.fused == {str(ENCODER): ["add_norm", "gelu"], str(LAST): ["gelu"]} == fused_now()
    assert found.notes[0] == "fused operations ['add_norm', 'abacus'] of the checkpoint are not known here: chosen again"


def test_a_measurement_that_fails_is_reported_with_its_reason(blocks):
    blocks.best, blocks.others = Variant("math"), ({}, {"attention math": "RuntimeError: no C compiler"})
    assert choose_attention(RECIPE, FP32, ALONE).notes == (
        "blocks could not be measured, so that nothing is fused: RuntimeError: no C compiler",
    )


def test_what_does_not_work_where_a_run_is_resumed_is_chosen_again(tmp_path, blocks, monkeypatch):
    monkeypatch.setattr(fused_choice, "why_not_fused", lambda name, *_: "crashed" if name == "gelu" else None)
    blocks.best = Variant("math")
    found = choose_attention(RECIPE, FP32, ALONE, checkpoint(tmp_path))
    assert found.fused == {str(ENCODER): ["add_norm"], str(LAST): []}
    assert found.notes[0] == (f"fused gelu of the checkpoint does not work here, crashed; nothing is used for {LAST}")


@pytest.mark.parametrize("fused", [7, ["add_norm"], {str(ENCODER): 7, str(LAST): [["gelu"]]}])
def test_a_choice_that_cannot_be_understood_is_none(fused, tmp_path, blocks):
    assert choose_attention(RECIPE, FP32, ALONE, checkpoint(tmp_path, fused=fused)).fused == {
        str(s): ["add_norm", "gelu"] for s in SHAPES
    }


def test_a_checkpoint_of_before_is_measured_for_with_its_own_attention(tmp_path, blocks):
    saved = checkpoint(tmp_path)
    del saved.state["attention"]["fused"]
    model = json.loads(saved.state["model"])
    del model["fused"]
    saved.state["model"] = json.dumps(model)
    found = choose_attention(RECIPE, FP32, ALONE, saved)
    assert set(found.backends.values()) == {"math"} and len(blocks) == 2 and found.text == "math, fused: add_norm, gelu"


def test_auto_after_names_chooses_again_and_names_win_over_the_checkpoints(tmp_path, blocks):
    found = choose_attention(RECIPE, FP32, ALONE, checkpoint(tmp_path, recipe=recipe_of(fused="gelu")))
    assert len(blocks) == 2 and found.text == "math, fused: add_norm, gelu"
    named = choose_attention(recipe_of(fused="linear,gelu"), FP32, ALONE, checkpoint(tmp_path))
    off = choose_attention(recipe_of(fused="off"), FP32, ALONE, checkpoint(tmp_path))
    assert (named.text, off.text, len(blocks)) == ("math, fused: linear, gelu", "math, fused: nothing", 2)


def test_a_name_that_does_not_work_is_an_error(monkeypatch):
    monkeypatch.setattr(fused_choice, "why_not_fused", lambda name, *_: "crashed" if name == "gelu" else None)
    with pytest.raises(InputError, match=rf"^fused gelu does not work here for {ENCODER}, crashed; choose auto or off$"):
        choose_attention(recipe_of(fused="add_norm,gelu"), FP32, ALONE)


def test_on_a_cpu_nothing_is_measured_and_nothing_said():
    found = choose_attention(RECIPE, FP32, ALONE)
    assert found.fused == {} and found.text == "sdpa" and fused_now() == {str(s): [] for s in SHAPES}


class Told(World):
    """Rank 1 of 2, which is given what the main process says."""

    word: str = ""

    def by_main(self, work):
        return self.word

    def any(self, *flags):
        return list(flags)


def test_other_ranks_take_rank_0s_choice(monkeypatch, blocks):
    main = choose_attention(RECIPE, FP32, ALONE)
    monkeypatch.setattr(Told, "word", json.dumps(asdict(main)))
    for holder in (choice, attention_choice):
        monkeypatch.setattr(holder, "_chosen", {})
    blocks.clear()
    found = choose_attention(RECIPE, FP32, Told(1, 2, torch.device("cpu")))
    assert found == main and blocks == [] and fused_now() == main.fused
    assert [attention_choice.fastest("cpu", FP32, shape) for shape in SHAPES.values()] == ["short", "short"] and blocks == []
