"""A command that resumes a run need not repeat the run's settings."""

import json
from dataclasses import fields, replace
from pathlib import Path

import pytest
import tyro

from fastmae import DataError, InputError, ModelConfig
from fastmae.data.augment import Augment
from fastmae.model.config import preset
from fastmae.train.cli.main import main
from fastmae.train.config.recipes import RECIPES, Recipe
from fastmae.train.config.resumed import SETTINGS, with_settings_of_run, write_settings
from fastmae.train.config.run import Run
from fastmae.train.config.settings import PretrainSettings
from tests.support.runs import records

RECIPE = Recipe(
    model=preset("small", norm_pix_loss=False, img_size=(64, 96), patch_size=8, in_chans=1, decoder_depth=2, residual="bf16"),
    mask_ratio=0.6, steps=40, epochs=5, warmup_epochs=0.5, effective_batch=24, blr=3e-4, min_lr=1e-7, weight_decay=0.1, views=2,
    augment=Augment(scale=(0.5, 0.9), flip=False), shuffle_window=3, seed=7, progressive=((0.1, (32, 48)), (0.55, (64, 96))),
)  # fmt: skip
RUN = {"data": "some data", "stage": Path("/disk"), "batch_size": 12, "workers": 3, "keep_every": 10, "async_save": False,
       "draw_every": None, "timeout": 7.5, "requeue_exit": True, "precision": "fp32", "wandb": "project"}  # fmt: skip


@pytest.fixture
def run_folder(tmp_path):
    folder = tmp_path / "run"
    (folder / "step-0000003").mkdir(parents=True)
    write_settings(RECIPE, Run(out=folder, **RUN))
    return folder


def settings(*arguments):
    given = tyro.cli(tyro.conf.OmitArgPrefixes[PretrainSettings], args=list(map(str, arguments)))
    return with_settings_of_run(given, list(map(str, arguments)))


def test_every_setting_that_is_not_given_is_the_runs_own(run_folder, tmp_path):
    found, path = settings("--out", run_folder)
    assert path == run_folder / SETTINGS
    assert found.resolve(world_size=5) == RECIPE
    assert found.run() == Run(out=run_folder, **RUN)
    for resume in (run_folder, run_folder / "step-0000003", f"exact:{run_folder / 'step-0000003'}"):
        other, _ = settings("--out", tmp_path / "other", "--resume", resume)
        assert other.resolve(world_size=5) == RECIPE and other.out == tmp_path / "other"


def test_what_is_given_counts(run_folder):
    found, _ = settings("small", "--out", run_folder, "--flip", "--batch-size", 64, "--img-size", 32, "--progressive", "0.5:64",
                        "--draw-every", 9, "--async-save", "--blr", 1e-3)  # fmt: skip
    model = replace(RECIPE.model, img_size=(32, 32))
    augment = replace(RECIPE.augment, flip=True)
    progressive = ((0.5, (64, 64)),)
    assert found.resolve(1) == replace(RECIPE, model=model, augment=augment, blr=1e-3, progressive=progressive)
    assert found.run() == Run(out=run_folder, **{**RUN, "batch_size": 64, "draw_every": 9, "async_save": True})
    found = settings("--out", run_folder, "--stage", None, "--wandb", None, "--no-requeue-exit")[0].run()
    assert (found.stage, found.wandb, found.requeue_exit) == (None, None, False)


def test_epochs_that_are_given_replace_the_runs_steps_and_its_warm_up(run_folder):
    recipe = settings("--out", run_folder, "--epochs", 0.25)[0].resolve(1)
    assert (recipe.steps, recipe.epochs) == (None, 0.25) and recipe.warmup_epochs == pytest.approx(0.25 * 40 / 800)
    assert settings("--out", run_folder, "--steps", 50)[0].resolve(1) == replace(RECIPE, steps=50)
    assert settings("--out", run_folder, "--epochs", 5)[0].resolve(1) == replace(RECIPE, steps=None)


def test_a_model_of_no_presets_sizes_is_named_as_one_to_resume_from_python(tmp_path):
    (tmp_path / "step-0000003").mkdir()
    write_settings(replace(RECIPE, model=replace(RECIPE.model, depth=3)), Run(out=tmp_path, data="d"))
    with pytest.raises(InputError, match=r"a model of other sizes is resumed as it was started, by fastmae.train.api"):
        settings("--out", tmp_path)[0].resolve(1)


def test_a_recipe_that_is_given_brings_its_epochs_and_warm_up(tmp_path):
    (tmp_path / "step-0000003").mkdir()
    write_settings(replace(RECIPES["reference-b"](), steps=9, warmup_epochs=1, blr=1e-3), Run(out=tmp_path, data="d"))
    found = settings("--out", tmp_path, "--recipe", "paper-b")[0].resolve(8)
    assert found == replace(RECIPES["paper-b"](), blr=1e-3)


def test_a_file_from_elsewhere_allows_no_shell_command_and_names_no_folder(run_folder, tmp_path):
    others = {"preset": "base", "data": "pipe:touch mark", "out": "elsewhere", "resume": "elsewhere", "allow_pipe": True}
    (run_folder / SETTINGS).write_text(json.dumps(others))
    found, _ = settings("--out", tmp_path / "other", "--resume", run_folder)
    assert (found.allow_pipe, found.out, found.resume) == (False, tmp_path / "other", str(run_folder))
    assert settings("--out", tmp_path / "other", "--resume", run_folder, "--allow-pipe")[0].allow_pipe


@pytest.mark.parametrize("hostile", [{"tyro-write-completion": ["bash", "mark"]}, {"tyro_write_completion": ["bash", "mark"]},
                                     {"progressive": ["--tyro-write-completion", "bash", "mark"]},
                                     {"allow-pipe": True}, {"size_of_nothing": 3}])  # fmt: skip
def test_a_file_holds_settings_and_no_other_flags(hostile, run_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (run_folder / SETTINGS).write_text(json.dumps({"preset": None} | hostile))
    with pytest.raises(DataError, match=rf"{SETTINGS}: holds no settings of a run"):
        settings("--out", run_folder)
    assert not Path("mark").exists()


def test_a_folder_without_a_checkpoint_is_started_with_what_is_given(run_folder):
    (run_folder / "step-0000003").rmdir()
    found, path = settings("tiny", "--data", "d", "--out", run_folder)
    assert path is None and found.resolve(1) == Recipe(model=preset("tiny", norm_pix_loss=True), effective_batch=64)


@pytest.mark.parametrize("text", ["", "[]", "7", "{}", '{"preset', '{"preset": ["base"]}', "[" * 100_000], ids=range(7))
def test_a_file_that_holds_no_settings_is_named(text, run_folder):
    (run_folder / SETTINGS).write_text(text)
    with pytest.raises(DataError, match=f"{SETTINGS}: holds no settings of a run"):
        settings("--out", run_folder)


def test_a_value_that_is_none_of_a_setting_ends_the_program_as_a_flag_does(run_folder, capsys):
    (run_folder / SETTINGS).write_text('{"preset": null, "batch_size": "x"}')
    with pytest.raises(SystemExit) as stop:
        settings("--out", run_folder)
    assert stop.value.code == 2 and SETTINGS in capsys.readouterr().err.replace("\n", "").replace(" ", "").replace("│", "")


def test_every_field_of_a_model_and_a_recipe_is_kept_or_follows_from_what_is():
    from fastmae.train.config.settings import MODEL, TRAINING

    derived = {"embed_dim", "depth", "num_heads", "mlp_ratio", "pixel_mean", "pixel_std", "num_predict"}
    assert {f.name for f in fields(ModelConfig)} <= {*MODEL, "img_size", *derived}
    assert {f.name for f in fields(Recipe)} <= {*TRAINING, "model", "augment", "progressive", "betas"}


def test_a_run_is_resumed_by_its_folder_alone(shard_folder, tmp_path, capsys):
    flags = ["--img-size", "32", "--patch-size", "8", "--batch-size", "8", "--workers", "0", "--device", "cpu", "--steps", "2",
             "--draw-every", "None", "--seed", "3"]  # fmt: skip
    assert main(["pretrain", "tiny", "--data", str(shard_folder), "--out", str(tmp_path / "run"), *flags]) == 0
    assert main(["pretrain", "--out", str(tmp_path / "run"), "--steps", "3"]) == 0
    assert f"settings that are not given are the run's own, {tmp_path}/run/{SETTINGS}" in capsys.readouterr().out
    recipes = [r["recipe"] for r in records(tmp_path / "run") if r.get("event") == "start"]
    assert recipes[1] == {**recipes[0], "steps": 3}
