"""Settings from the command line and from files: words, never code."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from fastmae import InputError, ModelConfig
from fastmae.model.config import PRESETS, preset
from fastmae.train.cli.main import main
from fastmae.train.config.recipes import RECIPES, Recipe
from fastmae.train.config.run import Run
from fastmae.train.config.settings import PretrainSettings, switches
from tests.support.runs import RECIPE

CODE = ["!!python/object/apply:os.system ['touch {mark}']", "__import__('os').system('touch {mark}')", "$(touch {mark})",
        "`touch {mark}`", "; touch {mark}", "{{__import__('os').system('touch {mark}')}}", "eval:open('{mark}','w')",
        "${{oc.env:HOME}}", "@{mark}"]  # fmt: skip
FLAGS = ["--batch-size", "--img-size", "--mask-ratio", "--norm-pix-loss", "--crop-scale", "--workers", "--seed", "--save-every",
         "--keep-every", "--async-save", "--recipe", "--attention", "--residual", "--device", "--precision", "--parallel",
         "--reduce", "--compile", "--crop"]  # fmt: skip
WORDS = ["--progressive", "--resume", "--data", "--fused"]


@pytest.mark.parametrize("code", CODE)
def test_code_on_the_command_line_is_refused_and_not_run(code, shard_folder, tmp_path, capsys):
    mark = tmp_path / "mark"
    text = code.format(mark=mark)
    base = ["pretrain", "tiny", "--data", str(shard_folder), "--out", str(tmp_path / "run"), "--device", "cpu",
            "--steps", "1", "--warmup-epochs", "0",
            "--workers", "0"]  # fmt: skip
    for flag in FLAGS:
        with pytest.raises(SystemExit) as stop:
            main([*base, flag, text])
        assert stop.value.code == 2, flag
    for flag in WORDS:
        assert main([*base, flag, text]) == 2, flag
        assert [line for line in capsys.readouterr().err.splitlines() if line.startswith("fastmae: ")], flag
    assert not mark.exists() and not list(tmp_path.glob("run/step-*"))


@pytest.mark.parametrize(
    "text",
    ["", "[]", "null", "7", '"x"', "!!python/object/apply:os.system [true]", '{"depth": "12"}', '{"depth": null}',
     '{"depth": [1]}', '{"img_size": "32"}', '{"img_size": [32]}', '{"img_size": [32, "x"]}', '{"img_size": {}}',
     '{"pixel_mean": 7}', '{"pixel_mean": ["a", "b", "c"]}', '{"mlp_ratio": NaN}', '{"mlp_ratio": Infinity}', '{"depth": 1.5}',
     '{"depth": true}', '{"attention": 7}', '{"attention": {}}', '{"fused": 7}', '{"fused": ["gelu"]}', '{"fused": ""}',
     '{"fused": "gelu,gelu"}', '{"__class__": "x"}', '{"patch_size": 0}',
     '{"embed_dim": 1e400}', "[" * 100_000, json.dumps({"depth": "x" * 100_000})],
    ids=range(30),
)  # fmt: skip
def test_a_model_config_that_is_none_is_refused(text):
    with pytest.raises(InputError) as refused:
        ModelConfig.from_json(text)
    assert len(str(refused.value)) < 500


def test_a_fused_operation_that_is_none_is_one_line_with_the_choices(tmp_path, capsys):
    flags = ["--data", str(tmp_path / "nowhere"), "--out", str(tmp_path / "run"), "--device", "cpu"]
    for command in (["pretrain", "tiny", *flags], ["doctor", "tiny", *flags]):
        assert main([*command, "--fused", "gelu,layer_norm"]) == 2
        wanted = "fused must be auto, off, or some of linear, add_norm, gelu joined by commas, got 'gelu,layer_norm'"
        assert capsys.readouterr().err == f"fastmae: {wanted}\n"
    names = PretrainSettings(preset="tiny", data="x", out=Path("y"), fused="gelu,linear").resolve(1).model.fused
    assert names == "gelu,linear"


def test_a_tilde_in_a_path_is_the_home_folder(shard_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "data").symlink_to(shard_folder)
    run = Run(data="~/data", out=Path("~/run"), stage=Path("~/disk"), resume="exact:~/run/step-0000001")
    assert (run.data, run.out, run.stage) == (str(tmp_path / "data"), tmp_path / "run", tmp_path / "disk")
    assert run.resume == f"exact:{tmp_path}/run/step-0000001"
    assert main(["shards", "info", "~/data"]) == 0
    with pytest.raises(InputError, match=r"~nobody-of-this-name/run: the home folder of ~ is not known"):
        Run(data="d", out=Path("~nobody-of-this-name/run"))


def test_a_learning_rate_that_rises_after_the_warm_up_is_refused():
    assert replace(RECIPE, min_lr=RECIPE.lr).min_lr == RECIPE.lr
    with pytest.raises(InputError, match=r"min_lr must not exceed the peak rate, .* = 0.0015625, .*; got 0.002"):
        replace(RECIPE, min_lr=0.002)


def test_a_run_that_would_never_leave_a_rate_of_0_is_refused():
    one_step = replace(RECIPE, steps=None, epochs=1, warmup_epochs=0.5)
    assert one_step.total_steps(9) == 2
    with pytest.raises(InputError, match=r"1 step under a warm-up trains at learning rate 0 .*--warmup-epochs 0"):
        one_step.total_steps(8)
    assert replace(one_step, warmup_epochs=0).total_steps(8) == 1


@pytest.mark.parametrize("name", [*PRESETS, *RECIPES])
def test_settings_that_are_not_given_are_the_recipes(name):
    given = {"recipe": name} if name in RECIPES else {"preset": name}
    wanted = RECIPES[name]() if name in RECIPES else Recipe(model=preset(name, norm_pix_loss=True), effective_batch=128)
    assert PretrainSettings(data="d", out=Path("o"), **given).resolve(world_size=2) == wanted


def test_switches_take_the_values_that_they_were_once_given():
    old = ["tiny", "--flip", "False", "--norm-pix-loss", "True", "--checkpointing", "--out", "True", "--no-flip"]
    assert switches(old) == ["tiny", "--no-flip", "--norm-pix-loss", "--checkpointing", "--out", "True", "--no-flip"]
    assert switches(["--flip=False", "--checkpointing=True", "--data=a"]) == ["--no-flip", "--checkpointing", "--data=a"]
