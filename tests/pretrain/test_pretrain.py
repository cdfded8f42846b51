"""Whole runs inside this process: stopped, resumed, refused, and what they leave behind."""

import json
import os
import re
import shutil
import signal
from dataclasses import replace

import pytest
from torch.optim.optimizer import register_optimizer_step_pre_hook

from fastmae import DivergedError, InputError
from fastmae.data.crops import Cropper
from fastmae.shards.build import write_shards
from fastmae.train.api import pretrain
from fastmae.train.config.recipes import RECIPES
from fastmae.train.config.run import accumulation
from fastmae.train.step.loss_module import LossModule
from tests.support.batches import damage_samples
from tests.support.runs import MODEL, RECIPE, assert_same_bits, losses, records, run_of, signal_after

pytestmark = pytest.mark.worth(3)


def test_six_steps_equal_three_and_three_resumed_bit_for_bit(shard_folder, tmp_path, monkeypatch):
    whole = pretrain(RECIPE, run_of(shard_folder, tmp_path / "whole"))

    with monkeypatch.context() as patch:
        signal_after(patch, 3)
        assert pretrain(RECIPE, run_of(shard_folder, tmp_path / "halves")).name == "step-0000003"
    resumed = pretrain(RECIPE, run_of(shard_folder, tmp_path / "halves", workers=2))
    assert resumed.name == whole.name == "step-0000006"
    assert_same_bits(whole, resumed)
    assert losses(tmp_path / "halves") == losses(tmp_path / "whole")


@pytest.mark.parametrize("stopped", [False, True], ids=["at once", "resumed"])
def test_each_update_is_made_at_its_own_learning_rate(stopped, shard_folder, tmp_path, monkeypatch):
    """Three steps of warm-up from 0, then three of half a cosine, also where a run is resumed."""
    used, recipe = [], replace(RECIPE, warmup_epochs=5)
    hook = register_optimizer_step_pre_hook(lambda optimizer, *_: used.append([float(g["lr"]) for g in optimizer.param_groups]))
    try:
        if stopped:
            with monkeypatch.context() as patch:
                signal_after(patch, 2)
                pretrain(recipe, run_of(shard_folder, tmp_path))
        pretrain(recipe, run_of(shard_folder, tmp_path))
    finally:
        hook.remove()
    peak = 0.05 * 8 / 256
    expected = [share * peak for share in (0, 1 / 3, 2 / 3, 1, 0.75, 0.25)]
    assert [rates[0] for rates in used] == pytest.approx(expected, rel=1e-6) and all(a == b for a, b in used)
    assert [r["lr"] for r in records(tmp_path) if "loss" in r] == pytest.approx(expected, rel=1e-6)


def test_a_worker_that_dies_is_told_and_changes_nothing(shard_folder, tmp_path, monkeypatch, capsys):
    whole = pretrain(RECIPE, run_of(shard_folder, tmp_path / "whole", workers=1))
    crop, parent, mark = Cropper.__call__, os.getpid(), tmp_path / "died"

    def die_once(self, *arguments):
        if os.getpid() != parent and not mark.exists():
            mark.write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGKILL)
        return crop(self, *arguments)

    monkeypatch.setattr(Cropper, "__call__", die_once)
    assert_same_bits(whole, pretrain(RECIPE, run_of(shard_folder, tmp_path / "killed", workers=1)))
    (death,) = [r["worker"] for r in records(tmp_path / "killed") if r.get("event") == "worker_died"]
    assert f"(pid {mark.read_text()}) was killed by SIGKILL" in death and death in capsys.readouterr().out


def test_neither_workers_nor_the_log_interval_change_a_bit_of_the_state(shard_folder, tmp_path):
    one = pretrain(RECIPE, run_of(shard_folder, tmp_path / "a"))
    two = pretrain(RECIPE, run_of(shard_folder, tmp_path / "b", workers=3, log_every=4, draw_every=None))
    assert_same_bits(one, two)


def test_accumulation_keeps_the_loss(shard_folder, tmp_path):
    pretrain(RECIPE, run_of(shard_folder, tmp_path / "whole"))
    pretrain(RECIPE, run_of(shard_folder, tmp_path / "parts", batch_size=2))
    assert losses(tmp_path / "whole") == pytest.approx(losses(tmp_path / "parts"), rel=1e-6)


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.all)])
def test_compilation_keeps_the_loss(precision, shard_folder, tmp_path):
    for how in ("off", "blocks", "model"):
        pretrain(replace(RECIPE, steps=3), run_of(shard_folder, tmp_path / how, compile=how, precision=precision))
    tolerance = 1e-5 if precision == "fp32" else 5e-3
    for how in ("blocks", "model"):
        assert losses(tmp_path / how) == pytest.approx(losses(tmp_path / "off"), rel=tolerance)


def test_two_runs_of_one_seed_have_the_same_bits(shard_folder, tmp_path):
    one, two = (pretrain(RECIPE, run_of(shard_folder, tmp_path / name)) for name in "ab")
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert_same_bits(one, two)


def test_checkpointing_keeps_the_bits(shard_folder, tmp_path):
    recipe = replace(RECIPE, model=replace(RECIPE.model, checkpointing=True))
    assert_same_bits(
        pretrain(RECIPE, run_of(shard_folder, tmp_path / "a")), pretrain(recipe, run_of(shard_folder, tmp_path / "b"))
    )


def test_speed_settings_may_change_on_resume_and_are_told(shard_folder, tmp_path, capsys):
    pretrain(replace(RECIPE, steps=4), run_of(shard_folder, tmp_path))
    other = replace(RECIPE, model=replace(RECIPE.model, checkpointing=True, attention="math"))
    pretrain(other, run_of(shard_folder, tmp_path))
    text = capsys.readouterr().out
    assert "changed since the checkpoint: attention auto -> math" in text
    assert "changed since the checkpoint: checkpointing False -> True" in text
    assert len(losses(tmp_path)) == 6


@pytest.mark.gpu
def test_a_graphed_run_with_a_loader_has_the_bits_of_a_plain_one(shard_folder, tmp_path):
    one, two = (pretrain(RECIPE, run_of(shard_folder, tmp_path / str(graphs), device="cuda", workers=1, cuda_graphs=graphs,
                                        compile="off")) for graphs in (False, True))  # fmt: skip
    assert_same_bits(one, two)


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{"precision": "bf16"}, {"precision": "fp16"}, {"skip_spikes": True, "cuda_graphs": True}])
def test_a_resumed_run_on_a_gpu_has_the_bits_of_an_uninterrupted_one(shard_folder, tmp_path, monkeypatch, options):
    recipe = replace(RECIPE, model=replace(RECIPE.model, attention="math"))
    options = {"device": "cuda", "compile": "off", "workers": 1, "save_every": 2, **options}
    whole = pretrain(recipe, run_of(shard_folder, tmp_path / "whole", **options))
    with monkeypatch.context() as patch:
        signal_after(patch, 3)
        pretrain(recipe, run_of(shard_folder, tmp_path / "halves", **options))
    assert_same_bits(whole, pretrain(recipe, run_of(shard_folder, tmp_path / "halves", **options)))


def test_cuda_graphs_on_a_cpu_are_refused(shard_folder, tmp_path):
    with pytest.raises(InputError, match="cuda graphs need a CUDA device, and this run is on cpu"):
        pretrain(RECIPE, run_of(shard_folder, tmp_path, cuda_graphs=True))


def test_a_run_leaves_everything_that_it_promises(shard_folder, tmp_path, capsys):
    folder = pretrain(RECIPE, run_of(shard_folder, tmp_path, save_every=2, keep=2))
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-0000004", "step-0000006"]
    assert list((tmp_path / "tensorboard").glob("events*"))
    state = json.loads((folder / "state.json").read_text())
    assert (state["step"], state["data"]["samples"], state["recipe"]["effective_batch"]) == (6, 48, 8)
    events = [json.loads(line).get("event") for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert events[0] == "start" and events[-1] == "end" and events.count("checkpoint") == 3
    text = capsys.readouterr().out
    assert "effective batch = 8 per process x 1 processes x 1 accumulated = 8" in text
    assert "lr = blr 0.05 x 8 / 256 = 0.0015625" in text


def test_a_finished_run_says_so_and_changes_nothing(shard_folder, tmp_path):
    folder = pretrain(RECIPE, run_of(shard_folder, tmp_path))
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert pretrain(RECIPE, run_of(shard_folder, tmp_path)) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before


def test_a_damaged_checkpoint_is_named_and_the_older_one_continued(shard_folder, tmp_path, capsys):
    pretrain(replace(RECIPE, steps=4), run_of(shard_folder, tmp_path, save_every=2))
    path = tmp_path / "step-0000004" / "model.safetensors"
    os.truncate(path, path.stat().st_size - 1)
    pretrain(replace(RECIPE, steps=5), run_of(shard_folder, tmp_path))
    text = capsys.readouterr().out
    assert f"skipped a damaged checkpoint: {path}" in text and f"resumed from {tmp_path / 'step-0000002'}" in text


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (replace(RECIPE, model=replace(MODEL, depth=3)), "another architecture, depth 2 in the checkpoint and 3 in this run"),
        (
            replace(RECIPE, model=replace(MODEL, norm_pix_loss=False)),
            "norm_pix_loss True in the checkpoint and False in this run",
        ),
        (replace(RECIPE, seed=1), "trained with seed 0, not 1"),
        (replace(RECIPE, effective_batch=16), "trained with effective_batch 8, not 16"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(recipe, message, shard_folder, tmp_path):
    pretrain(replace(RECIPE, steps=1, warmup_epochs=0), run_of(shard_folder, tmp_path))
    with pytest.raises(InputError, match=message):
        pretrain(recipe, run_of(shard_folder, tmp_path))


def test_settings_changed_since_the_checkpoint_are_said(shard_folder, tmp_path, capsys):
    pretrain(replace(RECIPE, steps=1, warmup_epochs=0), run_of(shard_folder, tmp_path))
    pretrain(replace(RECIPE, steps=2, mask_ratio=0.5), run_of(shard_folder, tmp_path))
    text = capsys.readouterr().out
    assert "changed since the checkpoint: mask_ratio 0.75 -> 0.5" in text
    assert "changed since the checkpoint: steps 1 -> 2" in text and "checkpoint: blr" not in text


def test_a_named_checkpoint_is_continued_unless_newer_ones_stand_in_the_way(shard_folder, tmp_path):
    whole = pretrain(RECIPE, run_of(shard_folder, tmp_path / "a", save_every=2))
    older = str(tmp_path / "a" / "step-0000002")
    with pytest.raises(InputError, match="step-0000006 is newer"):
        pretrain(RECIPE, run_of(shard_folder, tmp_path / "a", resume=older))
    assert_same_bits(whole, pretrain(RECIPE, run_of(shard_folder, tmp_path / "b", resume=older)))


def test_a_signal_repeated_at_once_still_saves(shard_folder, tmp_path, monkeypatch):
    signal_after(monkeypatch, 2, times=3)
    assert pretrain(RECIPE, run_of(shard_folder, tmp_path)).name == "step-0000002"


def test_updates_skipped_now_and_then_are_logged_and_the_run_continues(shard_folder, tmp_path, monkeypatch, capsys):
    forward, calls = LossModule.forward, []

    def spoil_two(*arguments):
        calls.append(1)
        return forward(*arguments) * (float("nan") if len(calls) in (2, 4) else 1.0)

    monkeypatch.setattr(LossModule, "forward", spoil_two)
    assert pretrain(RECIPE, run_of(shard_folder, tmp_path, log_every=6)).name == "step-0000006"
    assert "step 6: 2 updates skipped" in capsys.readouterr().out
    assert losses(tmp_path)[6] > 0


def test_the_first_step_of_each_start_is_logged_with_its_time_and_no_speed(shard_folder, tmp_path, monkeypatch, capsys):
    signal_after(monkeypatch, 4)
    pretrain(RECIPE, run_of(shard_folder, tmp_path, log_every=3))
    monkeypatch.undo()
    pretrain(RECIPE, run_of(shard_folder, tmp_path, log_every=3))
    measured = [r for r in records(tmp_path) if "loss" in r]
    assert [r["step"] for r in measured] == [1, 3, 4, 5, 6]
    assert [r["step"] for r in measured if r.get("first_step_seconds", 0) > 0] == [1, 5]
    assert [r["step"] for r in measured if "images_per_second" in r] == [3, 4, 6]
    assert re.search(r"^step 1/6 .* took \d+\.\d s ", capsys.readouterr().out, re.MULTILINE)


def test_bad_samples_are_named_in_the_log(shard_folder, tmp_path, capsys):
    shutil.copytree(shard_folder, tmp_path / "copy")
    damage_samples(tmp_path / "copy", 1)
    pretrain(RECIPE, run_of(tmp_path / "copy", tmp_path / "run"))
    assert "replaced a sample that cannot be used" in capsys.readouterr().out
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert any(r.get("event") == "replaced" and "photo_" in r["sample"] for r in records)


def test_other_data_is_refused_with_both_fingerprints(shard_folder, image_folder, tmp_path):
    pretrain(replace(RECIPE, steps=1, warmup_epochs=0), run_of(shard_folder, tmp_path / "run"))
    index, _ = write_shards(image_folder, tmp_path / "other", seed=1)
    with pytest.raises(InputError, match=f"other data than this run began with, fingerprint {index.fingerprint} here and"):
        pretrain(RECIPE, run_of(tmp_path / "other", tmp_path / "run"))


def test_gradients_that_stay_bad_end_the_run_with_good_weights(shard_folder, tmp_path, monkeypatch):
    spoil = LossModule.forward
    monkeypatch.setattr(LossModule, "forward", lambda *a: spoil(*a) * float("nan"))
    with pytest.raises(DivergedError, match="3 consecutive updates were skipped up to step 3: gradients were not finite; try"):
        pretrain(RECIPE, run_of(shard_folder, tmp_path, max_skips=3))


def test_streams_need_steps_say_what_they_are_and_train(shard_folder, tmp_path, capsys):
    tars = f"{shard_folder}/shard-{{000000..000003}}.tar"
    with pytest.raises(InputError, match="give --steps, or build indexed shards"):
        pretrain(replace(RECIPE, steps=None), run_of(tars, tmp_path))
    assert pretrain(RECIPE, run_of(tars, tmp_path)).name == "step-0000006"
    assert "a stream of 4 shards without an index: no exact order or resume" in capsys.readouterr().out


def test_effective_batch_is_made_of_whole_micro_batches():
    assert accumulation(4096, 64, 8) == 8
    with pytest.raises(InputError, match="4096 must be a multiple of 96 per process x 8 processes = 768"):
        accumulation(4096, 96, 8)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_the_published_ones(name):
    recipe = RECIPES[name]()
    assert recipe.lr == pytest.approx(2.4e-3) and recipe.warmup_epochs == 40 and recipe.model.norm_pix_loss
    assert recipe.epochs == (1600 if name.startswith("paper") else 800)
    assert (recipe.weight_decay, recipe.betas, recipe.mask_ratio) == (0.05, (0.9, 0.95), 0.75)
    assert recipe.total_steps(1281167) == -(-recipe.epochs * 1281167 // 4096)
