"""Checkpoints: complete or skipped, and kept and removed as promised."""

import errno
import json
import os
import shutil

import pytest

from fastmae import DataError
from fastmae.errors import SchemaError
from fastmae.train.checkpoint import format as checkpoint
from fastmae.train.checkpoint.format import list_checkpoints, open_checkpoint, remove_old, write_manifest
from tests.support.saves import damages, files_of, found_in, save, saver_of

FILES = ["manifest.json", "model.safetensors", "state.json", "tensors/.metadata", "tensors/__0_0.distcp"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with checkpoints of steps 1 and 2."""
    run = tmp_path_factory.mktemp("saved")
    for step in (1, 2):
        save(saver_of(run), step)
    return run


@pytest.fixture
def run(saved, tmp_path):
    """A copy of it, to be damaged."""
    return shutil.copytree(saved, tmp_path / "run")


def rewrite(path, **changes):
    """Change what a JSON file says, and let the manifest know."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    if path.name != "manifest.json":
        renew_manifest(path.parent)


def renew_manifest(folder):
    """A manifest of what ``folder`` holds now."""
    (folder / "manifest.json").unlink(missing_ok=True)
    write_manifest(folder)


def test_a_checkpoint_is_tensors_weights_state_and_manifest(saved):
    folder = saved / "step-0000002"
    assert sorted(files_of(folder)) == FILES
    state = json.loads((folder / "state.json").read_text())
    assert state["step"] == 2 and "\n" in (folder / "state.json").read_text()  # for people: a line each
    stated = json.loads((folder / "manifest.json").read_text())["files"]
    assert {name: len(data) for name, data in files_of(folder).items() if name != "manifest.json"} == {
        name: file["bytes"] for name, file in stated.items()
    }
    assert found_in(saved) == (folder, [])
    assert found_in(saved / "elsewhere") == (None, [])


@pytest.mark.parametrize("name", FILES)
def test_every_damage_is_found_and_named_and_the_older_one_used(name, run):
    folder = run / "step-0000002"
    path = folder / name
    whole = path.read_bytes()
    for damage, data in damages(whole, seed=FILES.index(name)).items():
        path.write_bytes(data)
        found, lines = found_in(run)
        assert found == run / "step-0000001" and len(lines) == 1, damage
        assert str(folder if name == "manifest.json" else path) in lines[0], damage
    path.unlink()
    found, (line,) = found_in(run)
    assert found == run / "step-0000001" and f"{path}: missing" in line
    path.write_bytes(whole)
    assert found_in(run) == (folder, [])


@pytest.mark.parametrize("error", [errno.EIO, errno.EACCES, errno.ESTALE])
def test_a_disk_that_does_not_give_a_file_any_more_is_damage(error, run, monkeypatch):
    digest = checkpoint.digest

    def refuse(file):
        if "step-0000002/tensors" in str(file.name):
            raise OSError(error, os.strerror(error))
        return digest(file)

    monkeypatch.setattr(checkpoint, "digest", refuse)
    found, (line,) = found_in(run)
    assert found == run / "step-0000001" and "tensors/.metadata: cannot be read" in line


LIES = {
    "nothing": None,
    "a list": [],
    "no files": {"files": None},
    "files as a list": {"files": ["model.safetensors"]},
    "a file as a word": {"files": {"model.safetensors": "whole"}},
    "a file as null": {"files": {"model.safetensors": None}},
    "a size as a word": {"files": {"model.safetensors": {"bytes": "many", "xxh3": 7}}},
    "no file at all": {"files": {}},
    "a name outside": {"files": {"../outside": {"bytes": 1, "xxh3": "0"}}},
    "an absolute name": {"files": {"/etc/hostname": {"bytes": 1, "xxh3": "0"}}},
    "a name too long": {"files": {"x" * 5000: {"bytes": 1, "xxh3": "0"}}},
    "a name of half a character": {"files": {"\udc00\ud800": {"bytes": 1, "xxh3": "0"}}},
    "a name with a zero": {"files": {"x\0y": {"bytes": 1, "xxh3": "0"}}},
    "a folder": {"files": {"tensors": {"bytes": 1, "xxh3": "0"}}},
}


@pytest.mark.parametrize("lie", LIES)
def test_a_manifest_that_lies_is_no_manifest(lie, run):
    (run / "step-0000002" / "manifest.json").write_text(json.dumps(LIES[lie]))
    found, (line,) = found_in(run)
    assert found == run / "step-0000001" and "step-0000002" in line


@pytest.mark.parametrize("name", ["tensors/__0_0.distcp", "tensors/.metadata", "model.safetensors", "state.json"])
def test_a_manifest_that_leaves_out_a_file_is_no_manifest(name, run):
    path = run / "step-0000002" / "manifest.json"
    files = json.loads(path.read_text())["files"]
    del files[name]
    rewrite(path, files=files)
    found, (line,) = found_in(run)
    assert found == run / "step-0000001" and f"{name}: missing" in line


def test_a_manifest_vouches_for_nothing_outside_its_folder(run):
    outside = run / "outside"
    outside.write_text("x")
    path = run / "step-0000002" / "manifest.json"
    files = json.loads(path.read_text())["files"]
    for name in ("../outside", str(outside)):
        rewrite(path, files={**files, name: checkpoint._fingerprint(outside)})
        with pytest.raises(DataError, match=r"manifest\.json: names .*outside, outside its folder"):
            open_checkpoint(path.parent)


@pytest.mark.parametrize(
    "change",
    [{"step": "2"}, {"step": True}, {"schema": "3"}, {"schema": 2.0}, {"data": []}, {"model": {}}, {"recipe": None},
     {"attention": None}, {"recipe": {"seed": 0}}, {"recipe": {"seed": "0", "effective_batch": 1}}],
)  # fmt: skip
def test_a_state_that_says_something_else_is_no_state(change, run):
    rewrite(run / "step-0000002" / "state.json", **change)
    found, (line,) = found_in(run)
    assert found == run / "step-0000001" and "missing or of the wrong type; it is not the state of a checkpoint" in line


@pytest.mark.parametrize("schema", [2, 99])
def test_another_schema_is_an_error_and_not_skipped(schema, run):
    """An older checkpoint would be trained on, and its successors would replace the newer ones, which are good."""
    folder = run / "step-0000002"
    (folder / "tensors" / ".metadata").unlink()  # a schema that has other files
    rewrite(folder / "state.json", schema=schema)
    for read in (lambda: found_in(run), lambda: open_checkpoint(folder)):
        with pytest.raises(SchemaError, match=f"step-0000002/state.json: has schema {schema}, this fastmae reads schema 3"):
            read()


def test_an_incomplete_folder_is_no_checkpoint(run):
    shutil.copytree(run / "step-0000002", run / "step-0000003", ignore=shutil.ignore_patterns("manifest.json"))
    (run / "step-9").mkdir()
    (run / "step-0000009").touch()
    with pytest.raises(DataError, match=r"manifest.json: missing"):
        open_checkpoint(run / "step-0000003")
    assert found_in(run)[0] == run / "step-0000002"


def test_the_newest_and_every_so_many_are_kept(tmp_path):
    saver = saver_of(tmp_path, keep=2, keep_every=4)
    for step in range(1, 12):
        save(saver, step)
    assert [p.name for p in list_checkpoints(tmp_path)] == [f"step-00000{n}" for n in ("11", "10", "08", "04")]
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_damaged_newer_ones_do_not_push_good_ones_out(run):
    for number in (7, 8, 9):
        (run / f"step-000000{number}").mkdir()
    save(saver_of(run, keep=2), 3)
    assert [p.name for p in list_checkpoints(run)][-2:] == ["step-0000003", "step-0000002"]
    assert found_in(run)[0] == run / "step-0000003"


def test_a_damaged_one_of_the_same_step_is_replaced(run):
    (run / "step-0000002" / "model.safetensors").write_bytes(b"")
    folder = save(saver_of(run), 2)
    assert found_in(run) == (folder, [])


def test_what_a_killed_process_left_is_removed_by_the_next_save(run):
    for name in (".step-0000005.partial", ".step-0000001.removed"):
        shutil.copytree(run / "step-0000001", run / name)
    save(saver_of(run), 3)
    assert sorted(p.name for p in run.iterdir()) == ["step-0000001", "step-0000002", "step-0000003"]


def test_an_old_one_that_cannot_be_removed_spoils_no_save(run, monkeypatch):
    """Files that somebody reads over NFS stay until they are closed."""

    def refuse(path, ignore_errors=False):
        if not ignore_errors:
            raise OSError(errno.EBUSY, "Device or resource busy", str(path))

    monkeypatch.setattr(shutil, "rmtree", refuse)
    saver = saver_of(run, keep=1)
    assert found_in(run)[0] != save(saver, 3)  # looked at before
    assert [s.error for s in saver.ended()] == [None] and found_in(run)[0] == run / "step-0000003"
    monkeypatch.setattr(type(run), "rename", lambda *_: refuse(run))
    remove_old(run, 3, 1, None)
