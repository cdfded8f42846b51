"""Which checkpoint a run resumes from: the newest complete one, the one that is named, or none, and then with a reason."""

import shutil
from dataclasses import replace

import pytest

from fastmae import DataError
from fastmae.errors import SchemaError
from fastmae.train.checkpoint import format as checkpoint
from fastmae.train.checkpoint.format import MODEL, write_manifest
from fastmae.train.pretrain.pretrain import pretrain
from tests.support.runs import RECIPE, assert_same_bits, records, run_of


@pytest.fixture(scope="module")
def trained(shard_folder, tmp_path_factory):
    """A run of six steps with the checkpoints of steps 2, 4 and 6."""
    out = tmp_path_factory.mktemp("trained")
    pretrain(RECIPE, run_of(shard_folder, out, save_every=2))
    return out


@pytest.fixture
def older(trained, tmp_path):
    """A copy of it as it was after step 4."""
    shutil.copytree(trained, tmp_path / "older")
    shutil.rmtree(tmp_path / "older" / "step-0000006")
    return tmp_path / "older"


def damage(folder, name=MODEL):
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)


def resume_from(shards, out, resume):
    return pretrain(replace(RECIPE, steps=6), run_of(shards, out, resume=str(resume)))


@pytest.mark.parametrize("name", [MODEL, "tensors/__0_0.distcp", "state.json", "manifest.json"])
def test_an_exact_checkpoint_that_is_damaged_is_an_error(name, older, shard_folder, tmp_path):
    damage(older / "step-0000004", name)
    with pytest.raises(DataError, match=f"{older / 'step-0000004'}/"):
        resume_from(shard_folder, tmp_path / "new", f"exact:{older / 'step-0000004'}")
    assert not list((tmp_path / "new").glob("step-*"))


def test_an_exact_checkpoint_that_is_gone_is_an_error(older, shard_folder, tmp_path):
    with pytest.raises(DataError, match=r"step-0000005/manifest.json: missing or damaged"):
        resume_from(shard_folder, tmp_path / "new", f"exact:{older / 'step-0000005'}")


@pytest.mark.parametrize("exact", ["", "exact:"])
def test_a_named_checkpoint_is_resumed_with_the_same_bits(exact, older, trained, shard_folder, tmp_path, capsys):
    last = resume_from(shard_folder, tmp_path / "new", f"{exact}{older / 'step-0000002'}")
    assert f"resumed from {older / 'step-0000002'}" in capsys.readouterr().out
    assert_same_bits(last, trained / "step-0000006")


def test_a_named_checkpoint_that_is_damaged_gives_way_to_the_next_older_one_and_is_reported(
    older, trained, shard_folder, tmp_path, capsys
):
    damage(older / "step-0000004")
    last = resume_from(shard_folder, tmp_path / "new", older / "step-0000004")
    text = capsys.readouterr().out
    assert f"skipped a damaged checkpoint: {older / 'step-0000004' / MODEL}: damaged" in text
    assert f"resumed from {older / 'step-0000002'}" in text
    assert_same_bits(last, trained / "step-0000006")


def test_a_named_run_is_resumed_from_its_newest_complete_checkpoint(older, trained, shard_folder, tmp_path, capsys):
    assert_same_bits(resume_from(shard_folder, tmp_path / "a", older), trained / "step-0000006")
    assert f"resumed from {older / 'step-0000004'}" in capsys.readouterr().out
    damage(older / "step-0000004")
    assert_same_bits(resume_from(shard_folder, tmp_path / "b", older), trained / "step-0000006")
    assert f"resumed from {older / 'step-0000002'}" in capsys.readouterr().out


def test_a_checkpoint_of_another_name_is_resumed_or_refused(older, trained, shard_folder, tmp_path):
    best = (older / "step-0000004").rename(tmp_path / "best")
    assert_same_bits(resume_from(shard_folder, tmp_path / "a", best), trained / "step-0000006")
    damage(best)
    with pytest.raises(DataError, match=f"{best / MODEL}: damaged"):
        resume_from(shard_folder, tmp_path / "b", best)


@pytest.mark.parametrize("resume", ["auto", "{older}", "{older}/step-0000004"])
def test_a_run_that_has_lost_all_its_checkpoints_does_not_start_from_step_0(resume, older, shard_folder, tmp_path):
    for number in (2, 4):
        damage(older / f"step-000000{number}")
    out = older if resume == "auto" else tmp_path / "new"
    with pytest.raises(DataError, match=r"no (complete )?checkpoint.*step-0000004/model\.safetensors: damaged"):
        resume_from(shard_folder, out, resume.format(older=older))
    assert [r for r in records(older) if r.get("event") == "start"][1:] == []


def test_a_run_without_checkpoints_starts_from_step_0(shard_folder, tmp_path, trained):
    (tmp_path / ".step-0000002.partial").mkdir()  # killed before it had one
    assert_same_bits(resume_from(shard_folder, tmp_path, "auto"), trained / "step-0000006")


@pytest.mark.parametrize("resume", ["auto", "{older}", "exact:{older}/step-0000004"])
def test_a_checkpoint_of_another_schema_stops_the_run_and_stays(resume, older, shard_folder, tmp_path):
    newest = older / "step-0000004"
    (newest / "state.json").write_text((newest / "state.json").read_text().replace('"schema": 3', '"schema": 4'))
    (newest / "manifest.json").unlink()
    write_manifest(newest)
    with pytest.raises(SchemaError, match="has schema 4, this fastmae reads schema 3"):
        resume_from(shard_folder, older if resume == "auto" else tmp_path / "new", resume.format(older=older))
    assert newest.is_dir()


def test_the_state_is_read_once_from_its_file(older, trained, shard_folder, monkeypatch):
    read, paths = checkpoint._read_json, []
    monkeypatch.setattr(checkpoint, "_read_json", lambda path: paths.append(path) or read(path))
    assert_same_bits(resume_from(shard_folder, older, "auto"), trained / "step-0000006")
    assert [path for path in paths if path.name == "state.json"] == [older / "step-0000004" / "state.json"]
