"""Checkpoints: whole or ignored, exact, and never run."""

import json
import os
import shutil

import pytest
import torch

from fastmae import DataError
from fastmae.train.checkpoint import find_checkpoint, list_checkpoints, load_checkpoint, save_checkpoint, verify
from tests.test_step import batch, make_step, weights


@pytest.fixture
def run(tmp_path):
    """A folder with checkpoints of steps 1 and 2."""
    model, step = make_step()
    for number in (1, 2):
        step([batch()], 1e-3)
        save_checkpoint(tmp_path, number, model, step.optimizer, {"samples": number * 8}, keep=3)
    return tmp_path


def test_weights_and_moments_come_back_bit_for_bit(run):
    model, step = make_step()
    for _ in range(2):
        step([batch()], 1e-3)
    other, other_step = make_step()
    state = load_checkpoint(run / "step-0000002", other, other_step.optimizer)
    assert (state["step"], state["samples"]) == (2, 16)
    for _ in range(3):
        assert torch.equal(step([batch()], 1e-3).loss, other_step([batch()], 1e-3).loss)
    assert all(torch.equal(w, weights(other)[n]) for n, w in weights(model).items())


def test_the_newest_complete_one_is_found(run):
    assert find_checkpoint(run) == (run / "step-0000002", [])
    assert find_checkpoint(run / "elsewhere") == (None, [])


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


FILES = ("model.safetensors", "optimizer.safetensors", "state.json")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("where", [0, 0.3, 0.7, 0.999])
def test_one_flipped_bit_is_found_and_the_older_one_used(run, name, where):
    path = run / "step-0000002" / name
    flip(path, int(where * path.stat().st_size))
    found, (line,) = find_checkpoint(run)
    assert found == run / "step-0000001"
    assert str(path) in line and "damaged" in line


@pytest.mark.parametrize("name", (*FILES, "manifest.json"))
@pytest.mark.parametrize("change", ["cut", "remove"])
def test_a_cut_or_missing_file_is_found_and_the_older_one_used(run, name, change):
    path = run / "step-0000002" / name
    os.truncate(path, path.stat().st_size // 2) if change == "cut" else path.unlink()
    found, (line,) = find_checkpoint(run)
    assert found == run / "step-0000001" and str(path) in line


def test_a_save_that_fails_leaves_the_older_ones_and_no_rubbish(run, monkeypatch):
    model, step = make_step()
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fastmae.train.checkpoint.save_tensors", full)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(run, 3, model, step.optimizer, {}, keep=1)
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before
    assert len(list(run.iterdir())) == 2


def test_only_the_newest_are_kept(run):
    model, step = make_step()
    step([batch()], 1e-3)
    for number in (3, 4):
        save_checkpoint(run, number, model, step.optimizer, {}, keep=2)
    assert [p.name for p in list_checkpoints(run)] == ["step-0000004", "step-0000003"]


def test_damaged_newer_ones_do_not_push_good_ones_out(run):
    model, step = make_step()
    step([batch()], 1e-3)
    for number in (7, 8, 9):
        (run / f"step-000000{number}").mkdir()
    (run / ".step-0000005.partial").mkdir()
    save_checkpoint(run, 3, model, step.optimizer, {}, keep=2)
    assert [p.name for p in list_checkpoints(run)][-2:] == ["step-0000003", "step-0000002"]
    assert not (run / ".step-0000005.partial").exists()
    assert find_checkpoint(run)[0] == run / "step-0000003"


def test_a_newer_schema_is_refused(run):
    model, step = make_step()
    path = run / "step-0000002" / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema": 99}))
    with pytest.raises(DataError, match="schema 99 is newer"):
        load_checkpoint(path.parent, model, step.optimizer)


def test_an_incomplete_folder_is_no_checkpoint(run):
    shutil.copytree(run / "step-0000002", run / "step-0000003", ignore=shutil.ignore_patterns("manifest.json"))
    (run / "step-9").mkdir()
    with pytest.raises(DataError, match=r"manifest.json: missing"):
        verify(run / "step-0000003")
    assert find_checkpoint(run)[0] == run / "step-0000002"
