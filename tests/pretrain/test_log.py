"""What a run tells: lines for people, metrics.jsonl, TensorBoard, Weights & Biases."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fastmae import InputError
from fastmae.train.pretrain.log import RunLog

VALUES = {"loss": 0.5, "lr": 1e-3, "grad_norm": 2.0, "images_per_second": 100.0, "seconds_per_step": 0.08, "data_wait": 0.25,
          "mfu": 0.421, "memory_bytes": 3 << 30, "epoch": 1.5}  # fmt: skip


def open_log(out, **options):
    return RunLog(out, is_main=True, first_step=0, total_steps=110, **options)


def lines(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_a_log_interval_is_one_line_with_everything_that_is_looked_for(tmp_path, capsys):
    log = open_log(tmp_path)
    log.measurements(10, **VALUES)
    log.measurements(20, **{**VALUES, "mfu": None})
    log.close()
    first, second = capsys.readouterr().out.splitlines()
    assert first == (
        "step 10/110  epoch 1.50  loss 0.5000  lr 1.00e-03  100.0 img/s  MFU 42.1%  data wait 25.0%  3.0 GiB  ETA 00:08"
    )
    assert "MFU" not in second
    assert lines(tmp_path)[0]["mfu"] == 0.421 and lines(tmp_path)[1]["mfu"] is None


def test_scalars_and_pictures_reach_tensorboard(tmp_path):
    log = open_log(tmp_path)
    log.measurements(10, **VALUES)
    log.picture(10, Image.fromarray(np.full((6, 8, 3), 200, np.uint8)))
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(10, 0.5)]
    (picture,) = events.Images("reconstruction")
    assert (picture.step, picture.width, picture.height) == (10, 8, 6)
    assert lines(tmp_path)[-1]["file"] == "reconstructions/step-0000010.png"
    with Image.open(tmp_path / "reconstructions" / "step-0000010.png") as drawn:
        assert drawn.size == (8, 6)


def test_a_line_that_a_kill_has_cut_does_not_spoil_the_next_one(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"event": "start", "step": 0}\n{"step": 1, "los')
    log = open_log(tmp_path)
    log.event("start", step=0)
    log.close()
    found = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert found[1] == '{"step": 1, "los' and json.loads(found[2])["event"] == "start"


def test_a_loss_that_is_none_is_null(tmp_path):
    log = open_log(tmp_path)
    log.measurements(10, **{**VALUES, "loss": float("nan")})
    log.close()
    assert lines(tmp_path)[0]["loss"] is None


def test_weights_and_biases_gets_the_same_and_goes_on_with_a_run(tmp_path, monkeypatch):
    begun, logged = [], []
    run = SimpleNamespace(log=lambda values, step: logged.append((step, values)), finish=lambda: logged.append("finished"))
    package = SimpleNamespace(init=lambda **options: begun.append(options) or run, Image=lambda image: image)
    monkeypatch.setitem(sys.modules, "wandb", package)
    for _ in range(2):
        log = open_log(tmp_path, wandb="project")
        log.measurements(10, **{**VALUES, "mfu": None})
        log.close()
    assert begun[0] == begun[1] and begun[0]["project"] == "project" and begun[0]["resume"] == "allow"
    assert logged[0][0] == 10 and logged[0][1]["train/loss"] == 0.5 and "train/mfu" not in logged[0][1]
    assert logged[1] == "finished"


def test_a_missing_package_is_named_on_every_process(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    for is_main in (True, False):
        with pytest.raises(InputError, match=r"--wandb needs wandb.*pip install wandb"):
            RunLog(tmp_path, is_main=is_main, first_step=0, total_steps=1, wandb="project")
