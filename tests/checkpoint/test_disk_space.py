"""Room for checkpoints, looked at before a run begins."""

import os
import shutil

import pytest

from fastmae import InputError
from fastmae.files import make_folder
from fastmae.train.checkpoint.disk_space import bytes_of_checkpoint, check_room
from fastmae.train.pretrain.pretrain import pretrain
from tests.support.runs import RECIPE, run_of, tensors_of

NEEDED = 1000


@pytest.fixture
def disk(tmp_path, monkeypatch):
    """A folder on a disk with as much room as the test says, and checkpoints of these steps."""

    def made(free, *steps, inodes=(0, 0)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - free, free))
        monkeypatch.setattr(os, "statvfs", lambda _: type("Found", (), {"f_files": inodes[0], "f_favail": inodes[1]}))
        for step in steps:
            (tmp_path / f"step-{step:07d}").mkdir()
        return tmp_path

    return made


def look(out, first=0, total=50, world_size=1, **fields):
    run = run_of("shards", out, **{"save_every": 10, **fields})
    return check_room(run, NEEDED, world_size=world_size, first_step=first, total_steps=total)


@pytest.mark.parametrize(
    ("free", "there", "options", "short"),
    [
        (4000, (), {}, None),  # the newest three, and the one that is being written
        (3999, (), {}, "3 of 4"),
        (1000, (), {"total": 7}, None),  # one is saved
        (1000, (), {"keep": 1}, "1 of 2"),
        (1000, (10, 20, 30), {"first": 30}, None),  # each replaces an old one
        (1999, (10, 20), {"first": 20}, "1 of 2"),
        (1000, (10, 20, 30), {"first": 40}, None),
        (4999, (), {"keep": 1, "keep_every": 20, "total": 100}, "4 of 7"),
        (0, (50,), {"first": 50}, None),  # nothing is left to do
    ],
)
def test_a_warning_counts_what_is_to_stand_there_at_once(free, there, options, short, disk):
    warning = look(disk(free, *there), **options)
    assert (warning is None) if short is None else f"space for {short} further checkpoints of 1,000 bytes" in warning
    assert warning is None or f"{free:,} are free" in warning


def test_where_not_one_fits_the_run_is_refused_with_path_and_bytes(disk):
    with pytest.raises(
        InputError, match=r"test_\S+: a checkpoint needs 1,000 bytes, 999 are free; free disk space, or give another"
    ):
        look(disk(999, 10, 20, 30), first=30)


@pytest.mark.parametrize(("inodes", "is_short"), [((100, 9), False), ((100, 8), True), ((0, 0), False)])
def test_files_count_as_well(inodes, is_short, disk):
    folder = disk(9000, inodes=inodes)
    if not is_short:
        assert look(folder) is None
        return
    with pytest.raises(InputError, match=r"a checkpoint needs 9 files, 8 inodes are free \(df -i\)"):
        look(folder)


def test_what_a_killed_save_has_left_is_removed_first(disk):
    folder = disk(9000)
    (folder / ".step-0000010.partial").mkdir()
    assert look(folder) is None and list(folder.iterdir()) == []


def test_the_bytes_are_those_of_a_real_checkpoint_and_the_warning_stands_in_the_log(
    shard_folder, tmp_path, monkeypatch, capsys
):
    folder = pretrain(RECIPE, run_of(shard_folder, tmp_path / "run"))
    written = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    tensors = {name: t for name, t in tensors_of(folder).items() if not name.startswith("random/")}
    assert written <= bytes_of_checkpoint(tensors) < written + (1 << 20)
    room = bytes_of_checkpoint(tensors) + (1 << 16)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1 << 30, 0, room))
    pretrain(RECIPE, run_of(shard_folder, tmp_path / "short", save_every=2))
    assert "short: space for 1 of 3 further checkpoints" in capsys.readouterr().out


def test_a_folder_that_is_a_file_is_called_one(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file: is a file, not a folder; choose another output folder"):
        make_folder(tmp_path / "file")
