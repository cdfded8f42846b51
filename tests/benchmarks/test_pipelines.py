"""The loader's benchmark: every pipeline measured in one run, on batches of the same images."""

import io
import json
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from tqdm import tqdm

from fastmae.benchmarks import loader, pipelines
from fastmae.benchmarks.cli import main
from fastmae.data.augment import DRAWS, Augment, draw_crop
from fastmae.images.resize import resized_crop
from tests.support.pictures import make_picture


@pytest.fixture
def small(monkeypatch):
    """Batches of 16 and two of them, instead of 256 and six."""
    for module in (loader, pipelines):
        monkeypatch.setattr(module, "BATCH", 16)
    monkeypatch.setattr(pipelines, "_WARM_UP", 1)
    monkeypatch.setattr(loader, "_BATCHES", 2)


def test_every_pipeline_is_measured_and_shown(small, shard_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(loader, "tqdm", partial(tqdm, mininterval=0, miniters=1))  # a busy or idle machine shows the same
    command = [
        "loader",
        "--data",
        str(shard_folder),
        "--workers",
        "2",
        "--rounds",
        "2",
        "--device",
        "cpu",
        "--out",
        str(tmp_path),
    ]
    assert main(command) == 0
    out, progress = capsys.readouterr()
    assert "24/24" in progress and "webdataset + DataLoader" in progress  # two rounds of eight pipelines and the warm-up
    section = json.loads(out.splitlines()[-1])["loader"]
    rows = {row["pipeline"]: row for row in section["rows"]}
    assert list(rows) == list(loader._ROWS) and all(row["images_per_second"] > 0 for row in rows.values())
    for name in ("fastmae, crop on the device", "fastmae, crop on the CPU"):
        row = rows[name]
        assert row["processes"] == 2 and row["images_per_second_per_core"] == row["images_per_second"] / 2
        assert {"efficiency", "per_core_over_reference", "main_thread_milliseconds"} <= row.keys()
    assert "| fastmae, crop on the CPU |" in next(tmp_path.glob("*.md")).read_text()


def test_tars_without_an_index_are_measured_too(small, shard_folder, tmp_path):
    (tmp_path / "tars").mkdir()
    for tar in shard_folder.glob("*.tar"):
        (tmp_path / "tars" / tar.name).symlink_to(tar)
    section = loader.measure_loader(tmp_path / "tars", shard_folder, workers=1, rounds=1)
    assert len(section["rows"]) == len(loader._ROWS) and not list((tmp_path / "tars").glob("*.json"))


def test_the_pillow_pipeline_makes_the_same_crop():
    """Rivals must do the same work: the normalised crop is ours within a level."""
    data = io.BytesIO()
    make_picture(3, (300, 400)).save(data, "PNG")
    draws = np.random.default_rng(0).random(DRAWS, np.float32)
    found = pipelines.pillow_tensor(data.getvalue(), draws)
    image = np.array(Image.open(data))
    expected = resized_crop(image, *(draw_crop(draws, 300, 400, Augment())[:1]), (224, 224), bool(draws[0] < 0.5)).float() / 255
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    assert (found * std + mean - expected).abs().max() < 2.5 / 255


def test_a_step_fed_from_shards_is_held_against_one_from_memory(shard_folder, device):
    section = loader.measure_fed_step("tiny", shard_folder, 2, 1, torch.device(device), steps=2)
    assert [row["fed"] for row in section["rows"]] == ["from memory", "from shards", "from memory again"]
    assert 0 <= section["waiting"] < 1 and "of a step is spent waiting for data" in section["notes"][0]
    assert len(loader.fed_table(section)) == 4


def test_a_gpu_that_is_not_there_is_said(shard_folder, capsys):
    assert main(["loader", "--data", str(shard_folder), "--gpu", "--device", "cpu"]) == 2
    assert "--gpu needs a CUDA device" in capsys.readouterr().err
