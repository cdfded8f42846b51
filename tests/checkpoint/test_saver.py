"""Saving: beside training with the same bytes, one at a time, and on the disk before it has a name."""

import os
import threading
from pathlib import Path

import pytest
import torch

from fastmae.model.weights import load_model
from fastmae.train.checkpoint import saver as saver_file
from fastmae.train.checkpoint.format import list_checkpoints
from tests.support.runs import assert_same_bits, tensors_of
from tests.support.saves import files_of, found_in, save, saver_of, tensors_at


@pytest.fixture
def gate(monkeypatch):
    """While it is closed, no save gets past its first file."""
    opened = threading.Event()
    write = saver_file.write_tensors

    def wait_then_write(*arguments):
        assert opened.wait(60)
        return write(*arguments)

    monkeypatch.setattr(saver_file, "write_tensors", wait_then_write)
    yield opened
    opened.set()


def test_saves_beside_training_and_saves_that_are_waited_for_are_equal(tmp_path):
    folders = []
    for name, asynchronous in (("waits", False), ("beside", True)):
        saver = saver_of(tmp_path / name, asynchronous=asynchronous)
        saver.out.mkdir()
        torch.manual_seed(0)
        folders.append(save(saver, 3))
        saver.wait()
    one, two = ({n: data for n, data in files_of(f).items() if ".metadata" not in n and "manifest" not in n} for f in folders)
    assert one == two and len(one) == 3  # the metadata names its folder
    assert_same_bits(*folders)
    assert load_model(folders[0] / "model.safetensors").state_dict()["norm.weight"].tolist() == [3.0] * 8


def test_tensors_may_change_as_soon_as_a_save_has_begun(gate, tmp_path):
    saver, tensors = saver_of(tmp_path, asynchronous=True), tensors_at(1)
    folder = save(saver, 1, tensors)
    for tensor in tensors.values():
        tensor.fill_(7)
    torch.rand(3)
    assert list_checkpoints(tmp_path) == []
    gate.set()
    saver.wait()
    assert found_in(tmp_path) == (folder, [])
    assert all((t == 1).all() for name, t in tensors_of(folder).items() if not name.startswith("random/"))
    assert saver.newest == folder


def test_one_save_is_under_way_at_a_time(gate, tmp_path, monkeypatch):
    saver = saver_of(tmp_path, asynchronous=True)
    save(saver, 1)
    second = threading.Thread(target=save, args=(saver, 2))
    second.start()
    second.join(0.3)
    assert second.is_alive()  # waits for the first
    gate.set()
    second.join(60)
    saver.wait()
    assert [(s.step, s.error) for s in saver.ended()] == [(1, None), (2, None)] and saver.ended() == []
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-0000002", "step-0000001"]


def test_how_a_save_ended_is_reported(tmp_path):
    saver = saver_of(tmp_path)
    folder = save(saver, 1)
    (ended,) = saver.ended()
    assert (ended.step, ended.folder, ended.error) == (1, folder, None) and ended.seconds > 0
    assert ended.bytes == sum(len(data) for name, data in files_of(folder).items() if name != "manifest.json")


def test_all_bytes_are_on_the_disk_before_the_name_is(tmp_path, monkeypatch):
    flushed, unflushed = {}, []
    fsync, rename = os.fsync, Path.rename

    def content(path):
        return path.read_bytes() if path.is_file() else sorted(p.name for p in path.iterdir())

    def note(handle):
        path = Path(f"/proc/self/fd/{handle}").readlink()
        flushed[path.stat().st_ino] = content(path)
        fsync(handle)

    def look_then_rename(self, target):
        if target.name == "step-0000001":
            unflushed.append([p.name for p in (self, *self.rglob("*")) if flushed.get(p.stat().st_ino) != content(p)])
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(Path, "rename", look_then_rename)
    save(saver_of(tmp_path), 1)
    assert unflushed == [[]] and flushed[tmp_path.stat().st_ino] == ["step-0000001"]  # last the folder of the name itself


def test_a_fault_of_ours_is_raised_where_the_run_waits(tmp_path, monkeypatch):
    saver = saver_of(tmp_path, asynchronous=True)
    monkeypatch.setattr(torch, "save", lambda *_: [][0])
    save(saver, 1)
    with pytest.raises(IndexError):
        saver.wait()
