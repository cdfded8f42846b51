"""Which attention a run computes with: chosen once, kept in its checkpoints, used again where it is resumed."""

import json
import os
import signal
import threading
import time
from dataclasses import replace

import pytest
import torch

from fastmae.errors import InputError, RequeueError
from fastmae.model.attention import choice
from fastmae.model.attention.backends import Shape
from fastmae.model.block.trial import TRIED
from fastmae.model.config import FUSED
from fastmae.train.checkpoint.format import STATE, Checkpoint
from fastmae.train.distributed.world import World
from fastmae.train.pretrain import attention_choice as backend
from fastmae.train.pretrain import fused_choice, pretrain
from fastmae.train.pretrain.attention_choice import choose_attention, probe_attention, run_shapes
from fastmae.train.pretrain.fused_choice import run_block_shapes
from tests.support.runs import MODEL, RECIPE, assert_same_bits, records, run_of, signal_after

ALONE = World(0, 1, torch.device("cpu"))
SHAPES = [Shape(5, 5, 3, 8), Shape(12, 17, 2, 8)]  # of RECIPE
FP32 = torch.float32


def named(name, recipe=RECIPE):
    return replace(recipe, model=replace(recipe.model, attention=name))


@pytest.fixture(autouse=True)
def own_memory(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTMAE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(choice, "_chosen", {})


@pytest.fixture
def measured(monkeypatch):
    """As on a GPU, attention is measured: ``measured.fastest`` wins. Holds the shapes that were."""

    class Measured(list):
        fastest = "math"

    calls = Measured()
    monkeypatch.setattr("fastmae.model.attention.dot_product.MEASURED", ("cpu",))
    monkeypatch.setattr(choice, "measure", lambda device, dtype, shape: calls.append(shape) or {calls.fastest: 1.0})
    return calls


def on_another_node(monkeypatch, tmp_path, name="elsewhere"):
    """Nothing is remembered there."""
    monkeypatch.setattr(choice, "_chosen", {})
    monkeypatch.setenv("FASTMAE_CACHE", str(tmp_path / name))


def checkpoint(folder, recipe=RECIPE, **attention):
    """As much of one as says what its run computed with."""
    saved = {"device": "cpu", "dtype": "float32", "backends": {str(s): "flash" for s in SHAPES}} | attention
    return Checkpoint(folder, {"model": recipe.model.to_json(), "attention": saved})


@pytest.mark.all  # with fused blocks it is shown in every run of the tests (test_fused_choice.py)
def test_a_resumed_run_computes_with_the_backend_of_its_checkpoint(shard_folder, tmp_path, monkeypatch, measured, capsys):
    whole = pretrain.pretrain(RECIPE, run_of(shard_folder, tmp_path / "whole"))
    assert measured == SHAPES
    with monkeypatch.context() as patch:
        signal_after(patch, 3)
        first = pretrain.pretrain(RECIPE, run_of(shard_folder, tmp_path / "halves"))
    kept = json.loads((first / STATE).read_text())["attention"]
    assert kept == {"device": "cpu", "dtype": "float32", "backends": {str(shape): "math" for shape in SHAPES}, "fused": {}}
    on_another_node(monkeypatch, tmp_path)
    measured.fastest = "flash"
    resumed = pretrain.pretrain(RECIPE, run_of(shard_folder, tmp_path / "halves"))
    assert measured == SHAPES  # and no more
    assert "attention math\n" in capsys.readouterr().out
    assert_same_bits(whole, resumed)
    assert [r["attention"] for r in records(tmp_path / "halves") if r.get("event") == "start"] == ["math", "math"]


def test_what_does_not_work_where_a_run_is_resumed_is_chosen_again_and_that_is_said(tmp_path, monkeypatch, measured):
    saved = checkpoint(tmp_path / "saved", backends={str(SHAPES[0]): "flash", str(SHAPES[1]): "sdpa"})
    works = backend.why_not
    monkeypatch.setattr(backend, "why_not", lambda b, *place: "no such kernel" if b == "flash" else works(b, *place))
    found = choose_attention(RECIPE, FP32, ALONE, saved)
    assert found.backends == {str(SHAPES[0]): "math", str(SHAPES[1]): "sdpa"} and measured == SHAPES[:1]
    assert found.notes == (
        f"attention flash of the checkpoint does not work here, no such kernel; math is used for {SHAPES[0]}",
    )
    assert found.text == "math and sdpa"


@pytest.mark.parametrize("saved", [{"dtype": "bfloat16"}, {"device": "cuda"}])
def test_a_choice_for_another_device_or_dtype_is_made_again(saved, tmp_path, measured):
    found = choose_attention(RECIPE, FP32, ALONE, checkpoint(tmp_path / "saved", **saved))
    assert set(found.backends.values()) == {"math"} and measured == SHAPES
    assert found.notes[0].startswith("attention is chosen again: float32 on cpu, and the checkpoint's was chosen for ")


def test_shapes_that_the_checkpoint_does_not_know_are_measured(tmp_path, measured):
    found = choose_attention(replace(RECIPE, mask_ratio=0.5), FP32, ALONE, checkpoint(tmp_path / "saved"))
    assert len(measured) == 2 and set(found.backends.values()) == {"math"} and found.notes == ()


@pytest.mark.parametrize("saved", [{}, {"backends": 7}, {"backends": {}}, {"backends": {str(SHAPES[0]): "abacus"}},
                                   {"backends": {str(SHAPES[0]): ["flash"]}}])  # fmt: skip
def test_a_choice_that_cannot_be_understood_is_none(saved, tmp_path, measured):
    found = Checkpoint(tmp_path, {"model": RECIPE.model.to_json(), "attention": saved})
    assert set(choose_attention(RECIPE, FP32, ALONE, found).backends.values()) == {"math"} and measured == SHAPES


def test_a_backend_given_by_name_wins_over_the_checkpoints_and_that_is_said(tmp_path, measured):
    found = choose_attention(named("math"), FP32, ALONE, checkpoint(tmp_path / "saved"))
    assert found.text == "math" and measured == []
    assert found.notes == ("attention math is used as given, the checkpoint's was flash",)
    same = choose_attention(named("flash"), FP32, ALONE, checkpoint(tmp_path / "saved"))
    assert same.text == "flash" and same.notes == ()


def test_auto_after_a_name_chooses_again(tmp_path, measured):
    """Who takes ``--attention flash`` away wants auto's choice."""
    found = choose_attention(RECIPE, FP32, ALONE, checkpoint(tmp_path / "saved", recipe=named("flash")))
    assert found.text == "math" and measured == SHAPES


def test_all_sizes_of_a_progressive_run_are_chosen_for():
    shapes = run_shapes(replace(RECIPE, progressive=((0.5, (48, 48)),)))
    assert shapes == [*SHAPES, Shape(10, 10, 3, 8), Shape(27, 37, 2, 8)]


def test_a_name_that_does_not_work_is_an_error_that_names_others(monkeypatch):
    monkeypatch.setattr(backend, "why_not", lambda b, *_: None if b in ("sdpa", "math") else "no such kernel")
    with pytest.raises(InputError) as error:
        choose_attention(named("flash"), FP32, ALONE)
    assert str(error.value) == (
        f"attention flash does not work here for {SHAPES[0]}, no such kernel; choose auto or sdpa or math"
    )


class Told(World):
    """Rank 1 of 2: what the main process says, and how the others vote, is given."""

    word: str = ""
    votes: tuple = ()

    def by_main(self, work):
        return self.word

    def any(self, *flags):
        type(self).votes += flags
        return list(flags)


def test_other_processes_take_the_main_ones_word_and_say_what_they_lack(monkeypatch, measured):
    main = choose_attention(RECIPE, FP32, ALONE)
    word = json.dumps({"device": "cpu", "dtype": "float32", "backends": main.backends, "xformers": None, "notes": []})
    monkeypatch.setattr(Told, "word", word)
    monkeypatch.setattr(choice, "_chosen", {})
    measured.clear()
    found = choose_attention(RECIPE, FP32, Told(1, 2, torch.device("cpu")))
    assert found == main and measured == [] and Told.votes == (False,)
    assert [choice.fastest("cpu", FP32, shape) for shape in SHAPES] == ["math", "math"] and measured == []

    monkeypatch.setattr(backend, "refusal", lambda name, *_: f"no {name} on this node")
    with pytest.raises(InputError, match="attention math does not work on rank 1, no math on this node; choose another one"):
        choose_attention(RECIPE, FP32, Told(1, 2, torch.device("cpu")))
    assert Told.votes == (False, True)


@pytest.fixture
def gpus(monkeypatch):
    """A machine of two described GPUs, none of which may be opened. Holds what is probed."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: pytest.fail("the GPU is opened"))
    asked = []
    monkeypatch.setattr(backend, "probe", lambda *a: asked.append(a))
    monkeypatch.setattr(fused_choice, "probe_blocks", lambda *a: asked.append(a))
    for name, value in {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1",
                        "MASTER_PORT": 29500}.items():  # fmt: skip
        monkeypatch.setenv(name, str(value))
    return asked


def test_rank_0_has_its_backends_probed_before_any_gpu_is_opened(shard_folder, tmp_path, gpus, monkeypatch):
    run = run_of(shard_folder, tmp_path, device="auto")
    probe_attention(RECIPE, run)
    probe_attention(named("cudnn"), replace(run, precision="fp16"))
    blocks = run_block_shapes(RECIPE)
    assert gpus == [
        ("cuda", torch.bfloat16, SHAPES, backend.BACKENDS, 0), ("cuda", torch.bfloat16, FP32, blocks, TRIED, 0),
        ("cuda", torch.float16, SHAPES, ("cudnn",), 0), ("cuda", torch.float16, FP32, blocks, FUSED, 0),
    ]  # fmt: skip
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    probe_attention(RECIPE, run)
    probe_attention(RECIPE, replace(run, device="cpu"))
    assert len(gpus) == 4


def test_a_run_probes_before_it_joins_the_others(shard_folder, tmp_path, monkeypatch):
    class Joined(Exception):
        pass

    def join(*_):
        assert order == ["probe"]
        raise Joined

    order = []
    monkeypatch.setattr(pretrain, "probe_attention", lambda recipe, run: order.append("probe"))
    monkeypatch.setattr(pretrain, "join_world", join)
    with pytest.raises(Joined):
        pretrain.pretrain(RECIPE, run_of(shard_folder, tmp_path))


@pytest.mark.parametrize(("requeues", "kind"), [(False, KeyboardInterrupt), (True, RequeueError)])
def test_a_signal_ends_a_run_that_probes_at_once(requeues, kind, shard_folder, tmp_path, monkeypatch):
    hangs = threading.Event()

    def hang(*_):
        os.kill(os.getpid(), signal.SIGINT)
        hangs.wait(30)

    monkeypatch.setattr(pretrain, "probe_attention", hang)
    began = time.monotonic()
    try:
        with pytest.raises(kind, match="stopped by SIGINT while attention backends were probed"):
            pretrain.pretrain(RECIPE, run_of(shard_folder, tmp_path, requeue_exit=requeues))
    finally:
        hangs.set()
    assert time.monotonic() - began < 10


@pytest.mark.gpu
@pytest.mark.worth(3)
def test_a_choice_on_a_gpu_is_resumed_by_a_process_that_would_choose_otherwise(shard_folder, tmp_path, monkeypatch):
    run = run_of(shard_folder, tmp_path / "run", device="cuda", compile="off")
    model = replace(MODEL, embed_dim=192, decoder_embed_dim=64)  # heads of 64 and 32 channels, as GPU kernels like them
    first = pretrain.pretrain(replace(RECIPE, steps=2, model=model), run)
    kept = json.loads((first / STATE).read_text())["attention"]
    assert (kept["device"], kept["dtype"]) == ("cuda", "bfloat16")
    on_another_node(monkeypatch, tmp_path)
    monkeypatch.setattr(choice, "measure", lambda *_: pytest.fail("measured again"))
    last = pretrain.pretrain(replace(RECIPE, steps=4, model=model), run)
    assert json.loads((last / STATE).read_text())["attention"] == kept
