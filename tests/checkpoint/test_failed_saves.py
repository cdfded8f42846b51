"""Saves that fail, each at another stage, and full disks: older checkpoints stay, and the run continues while it may."""

import errno
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from fastmae.errors import CheckpointError, DataError
from fastmae.train.checkpoint import saver as saver_file
from fastmae.train.checkpoint.format import list_checkpoints
from fastmae.train.checkpoint.state import total_bytes
from fastmae.train.cli.main import main
from tests.support.runs import FLAGS, finish, records, start
from tests.support.saves import files_of, found_in, save, saver_of, tensors_at

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Failure:
    """How a save can fail, each at another stage."""

    @staticmethod
    def at_the_free_space(patch):
        patch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 95, 5))

    @staticmethod
    def at_the_folder(patch):
        patch.setattr(Path, "mkdir", lambda self, **_: _raise(OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))))

    @staticmethod
    def in_the_tensors(patch):
        patch.setattr(torch, "save", lambda *_: _raise(FULL))

    @staticmethod
    def in_the_tensors_behind_another(patch):
        def save(*_):
            try:
                raise FULL
            finally:
                raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")

        patch.setattr(torch, "save", save)

    @staticmethod
    def in_the_weights(patch):
        patch.setattr(saver_file, "save_weights", lambda *_: _raise(FULL))

    @staticmethod
    def in_the_manifest(patch):
        patch.setattr(
            saver_file, "write_manifest", lambda folder: _raise(OSError(errno.EIO, "Input/output error", str(folder)))
        )

    @staticmethod
    def at_reading_back(patch):
        patch.setattr(saver_file, "read_back", lambda folder, *_: _raise(DataError(f"{folder}: cannot be read")))

    @staticmethod
    def at_the_rename(patch):
        patch.setattr(Path, "rename", lambda self, target: _raise(OSError(errno.EDQUOT, "Disk quota exceeded", str(self))))


def _raise(error):
    raise error


FAILURES = [name for name in vars(Failure) if not name.startswith("_")]


@pytest.mark.parametrize("asynchronous", [True, False], ids=["beside", "waits"])
@pytest.mark.parametrize("failure", FAILURES)
def test_a_save_that_fails_leaves_the_others_and_is_reported_with_path_and_bytes(failure, asynchronous, tmp_path, monkeypatch):
    saver = saver_of(tmp_path, asynchronous=asynchronous)
    for step in (1, 2, 3):
        save(saver, step)
    saver.wait()
    saver.ended()
    before = files_of(tmp_path)
    needed = total_bytes(tensors_at(4)) * 2 + (1 << 20) - 4  # the weights twice, the step once
    with monkeypatch.context() as patch:
        getattr(Failure, failure)(patch)
        save(saver, 4)
        saver.wait()
        (ended,) = saver.ended()
    assert files_of(tmp_path) == before and len(list(tmp_path.iterdir())) == 3
    assert str(tmp_path) in ended.error and f"it needs {needed} bytes" in ended.error and "\n" not in ended.error
    assert "bytes are free in" in ended.error and "None" not in ended.error
    assert saver.newest == tmp_path / "step-0000003" and ended.bytes == 0
    save(saver, 5)  # the next one works
    saver.wait()
    assert found_in(tmp_path) == (tmp_path / "step-0000005", [])


def test_three_consecutive_failures_end_the_run_and_a_good_save_resets_the_count(tmp_path, monkeypatch):
    saver = saver_of(tmp_path)
    for good in (1, 4):
        with monkeypatch.context() as patch:
            Failure.in_the_tensors(patch)
            for step in (good + 1, good + 2):
                save(saver, step)
        save(saver, good + 3)
    assert [s.error is None for s in saver.ended()] == [False, False, True, False, False, True]
    Failure.in_the_tensors(monkeypatch)
    save(saver, 8)
    save(saver, 9)
    with pytest.raises(
        CheckpointError, match=f"3 consecutive checkpoints could not be written, the last: {tmp_path}/.*No space left"
    ):
        save(saver, 10)
    saver.ended()
    with pytest.raises(CheckpointError, match=r"the last: .*No space left.* bytes are free"):  # raised again
        save(saver, 11)


def test_three_failures_beside_training_end_the_run_at_the_next_save(tmp_path, monkeypatch):
    saver = saver_of(tmp_path, asynchronous=True)
    Failure.at_the_free_space(monkeypatch)
    for step in (1, 2, 3):
        save(saver, step)
    with pytest.raises(CheckpointError, match="no space left on the disk; it needs"):
        save(saver, 4)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 16 MB of its own."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(disk)], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.decode().strip()}")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def big_state():
    return {**tensors_at(9), "optimizer/exp_avg/big": torch.ones(40 << 18)}  # 40 MB


@pytest.mark.cluster
@pytest.mark.parametrize("lies", [False, True], ids=["known beforehand", "found while writing"])
def test_a_disk_that_is_really_full_harms_no_older_checkpoint(lies, small_disk, monkeypatch):
    saver = saver_of(small_disk, asynchronous=True)
    small = save(saver, 1)
    saver.wait()
    saver.ended()
    before = files_of(small)
    if lies:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1 << 40, 0, 1 << 40))
    save(saver, 9, big_state())
    saver.wait()
    (ended,) = saver.ended()
    assert f"{small_disk}" in ended.error and "o space left on" in ended.error and "it needs 4" in ended.error
    assert ("tensors: No space left on device" in ended.error) == lies
    assert files_of(small) == before and [p.name for p in small_disk.iterdir()] == [small.name]
    assert found_in(small_disk) == (small, [])
    save(saver, 10)
    saver.wait()
    assert found_in(small_disk) == (small_disk / "step-0000010", [])


@pytest.mark.parametrize("options", ["remount,size=4m", "remount,nr_inodes=10,size=200m", "remount,ro"])
def test_a_folder_without_room_is_refused_before_the_first_step(options, small_disk, shard_folder, capsys):
    subprocess.run(["mount", "-o", options, str(small_disk)], check=True)
    assert main(["pretrain", "tiny", "--data", str(shard_folder), "--out", str(small_disk), "--workers", "0",
                 "--steps", "1", "--warmup-epochs", "0",
                 "--device", "cpu", "--batch-size", "8", "--img-size", "32", "--patch-size", "8"]) == 2  # fmt: skip
    (line,) = capsys.readouterr().err.splitlines()
    says = {"size": r"a checkpoint needs [\d,]{10,} bytes, [\d,]{7,} are free; free disk space, or give another --out$",
            "nr_inodes": r"a checkpoint needs 9 files, \d inodes are free \(df -i\): remove files, or give",
            "ro": "cannot be written, Read-only file system; choose another output folder$"}  # fmt: skip
    assert re.match(f"fastmae: {small_disk}: {says[options.split(',')[1].partition('=')[0]]}", line)
    assert not list(small_disk.glob("*step-*")) and not (small_disk / "metrics.jsonl").exists()


_LYING = "import shutil, sys; shutil.disk_usage = lambda _: shutil._ntuple_diskusage(1 << 40, 0, 1 << 40); "
_LYING_AT_FIRST = """
import shutil, sys
true = shutil.disk_usage
def lie(path):
    shutil.disk_usage = true
    return shutil._ntuple_diskusage(1 << 40, 0, 1 << 40)
shutil.disk_usage = lie
"""
_MAIN = "from fastmae.train.cli.main import main; sys.exit(main())"


@pytest.mark.cluster
@pytest.mark.parametrize("lies", [False, True], ids=["known beforehand", "found while writing"])
def test_a_run_whose_disk_becomes_full_continues_to_its_end_and_reports_that_it_is_not_saved(lies, small_disk, shard_folder):
    flags = ["--data", shard_folder, *FLAGS, "--steps", "3", "--batch-size", "8", "--save-every", "2", "--out", small_disk]
    program = ("-c", (_LYING if lies else _LYING_AT_FIRST) + _MAIN)
    code, text = finish(start([*flags, "--no-async-save"] if lies else flags, program=program))
    assert code == 5, text
    assert [r["step"] for r in records(small_disk) if "loss" in r] == [1, 2, 3]
    failed = [r for r in records(small_disk) if r.get("event") == "checkpoint_failed"]
    assert failed[0]["step"] == 2 and failed[-1]["step"] == 3 and f"{small_disk}" in failed[0]["error"]
    last = next(line for line in text.splitlines() if line.startswith("fastmae: "))
    assert "the checkpoint of step 3 could not be written" in last or "3 consecutive checkpoints could not be written" in last
    assert str(small_disk) in last and "it needs" in last and "bytes are free" in last and "Traceback" not in text
    assert list_checkpoints(small_disk) == [] and not list(small_disk.glob(".step-*"))
