"""Settings from the command line and from files: words, never code."""

import json

import pytest

from fastmae import InputError, ModelConfig
from fastmae.train.cli.main import main

CODE = ["!!python/object/apply:os.system ['touch {mark}']", "__import__('os').system('touch {mark}')", "$(touch {mark})",
        "`touch {mark}`", "; touch {mark}", "{{__import__('os').system('touch {mark}')}}", "eval:open('{mark}','w')",
        "${{oc.env:HOME}}", "@{mark}"]  # fmt: skip
FLAGS = ["--batch-size", "--img-size", "--mask-ratio", "--norm-pix-loss", "--crop-scale", "--workers", "--seed", "--save-every",
         "--keep-every", "--async-save"]  # fmt: skip
WORDS = ["--recipe", "--attention", "--residual", "--progressive", "--device", "--precision", "--parallel", "--reduce",
         "--compile", "--crop", "--decode", "--resume", "--data"]  # fmt: skip


@pytest.mark.parametrize("code", CODE)
def test_code_on_the_command_line_is_refused_and_not_run(code, shard_folder, tmp_path, capsys):
    mark = tmp_path / "mark"
    text = code.format(mark=mark)
    base = ["pretrain", "tiny", "--data", str(shard_folder), "--out", str(tmp_path / "run"), "--device", "cpu", "--steps", "1",
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
     '{"depth": true}', '{"attention": 7}', '{"attention": {}}', '{"__class__": "x"}', '{"patch_size": 0}',
     '{"embed_dim": 1e400}', "[" * 100_000, json.dumps({"depth": "x" * 100_000})],
    ids=range(26),
)  # fmt: skip
def test_a_model_config_that_is_none_is_refused(text):
    with pytest.raises(InputError) as refused:
        ModelConfig.from_json(text)
    assert len(str(refused.value)) < 500
