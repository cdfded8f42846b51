"""A copy of shards on another disk: complete or not there, whatever happens while it is made."""

import errno
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from fastmae.errors import DataError, InputError
from fastmae.files import digest
from fastmae.shards import stage
from fastmae.shards.index import Index
from fastmae.shards.index_tars import index_shards
from fastmae.shards.stage import Copy
from fastmae.shards.staged import MANIFEST, staged_folder
from fastmae.shards.verify import verify_shards
from tests.support.shards import contents


def tars(folder):
    return {name: data for name, data in contents(folder).items() if name.endswith(".tar")}


def run_copy(data, root, **options):
    copy = Copy(data, root, **options)
    return copy.run(), copy


def flip_a_bit(path, at=600):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_a_copy_is_the_same_data_byte_for_byte_under_the_same_fingerprint(shard_folder, tmp_path):
    folder, copy = run_copy(shard_folder, tmp_path)
    assert folder == staged_folder(tmp_path, Index.load(shard_folder))
    assert tars(folder) == tars(shard_folder) and verify_shards(folder) == []
    assert Index.load(folder).fingerprint == Index.load(shard_folder).fingerprint
    assert copy.copied == copy.total == sum(map(len, tars(folder).values())) and copy.skipped == 0
    before = {p: p.stat().st_mtime_ns for p in folder.iterdir()}
    _, again = run_copy(shard_folder, tmp_path)
    assert again.skipped == again.total and {p: p.stat().st_mtime_ns for p in folder.iterdir()} == before


def test_shards_of_another_folder_than_their_index_are_copied_beside_it(tar_folder, tmp_path):
    (tmp_path / "index").mkdir()
    index_shards(tar_folder, tmp_path / "index")
    folder, _ = run_copy(tmp_path / "index", tmp_path / "disk")
    copy = Index.load(folder)
    assert [s.name for s in copy.shards] == [f"shard-{n:06d}.tar" for n in range(4)]
    assert list(tars(folder).values()) == list(tars(tar_folder).values())
    assert copy.fingerprint == Index.load(tmp_path / "index").fingerprint


@pytest.mark.parametrize("root", ["", "disk"])
def test_only_missing_and_changed_shards_are_copied(root, copy, tmp_path, monkeypatch):
    folder, _ = run_copy(copy, tmp_path / root)
    names = sorted(tars(folder))
    flip_a_bit(folder / names[0])  # another time of change, so its bytes are hashed
    (folder / names[1]).unlink()
    (folder / names[2]).write_bytes(b"short")
    (folder / f".{names[3]}.partial").write_bytes(b"of a process that was killed")
    read = []
    blocks = stage._blocks
    monkeypatch.setattr(stage, "_blocks", lambda source: read.append(source.name) or blocks(source))
    _, again = run_copy(copy, tmp_path / root)
    assert sorted(read) == names[:3] and again.skipped == (folder / names[3]).stat().st_size
    assert tars(folder) == tars(copy) and not list(folder.glob(".*.partial"))


def test_what_was_touched_but_not_changed_is_hashed_and_kept(copy, tmp_path, monkeypatch):
    folder, _ = run_copy(copy, tmp_path / "disk")
    for path in folder.glob("*.tar"):
        os.utime(path)
    (folder / MANIFEST).write_text('no record\n["half a reco')
    monkeypatch.setattr(stage, "_blocks", None)
    assert run_copy(copy, tmp_path / "disk")[1].skipped == sum(map(len, tars(copy).values()))
    hashed = []
    monkeypatch.setattr("fastmae.shards.staged.digest", hashed.append)
    run_copy(copy, tmp_path / "disk")
    assert hashed == []  # recorded by now


def test_a_damaged_source_is_an_error_that_names_the_shard_and_the_others_are_kept(copy, tmp_path):
    names = sorted(tars(copy))
    flip_a_bit(copy / names[1])
    with pytest.raises(
        DataError, match=rf"{names[1]}: does not match its index: \d+ bytes of hash .* restore it, or index again"
    ):
        run_copy(copy, tmp_path / "disk", threads=1)
    folder = staged_folder(tmp_path / "disk", Index.load(copy))
    kept = tars(folder)
    assert names[0] in kept and names[1] not in kept and not (folder / "index.json").exists()
    flip_a_bit(copy / names[1])
    _, again = run_copy(copy, tmp_path / "disk")
    assert again.skipped == sum(map(len, kept.values())) and verify_shards(folder) == []


_COPY = r"""
import sys, time
from fastmae.shards import stage
blocks = stage._blocks
def slow(source):
    for number, block in enumerate(blocks(source)):
        sys.stdout.write("block\n")
        sys.stdout.flush()
        time.sleep(0.02)
        yield block
stage._BLOCK, stage._blocks = 4096, slow
print(stage.Copy(sys.argv[1], sys.argv[2], threads=2).run())
"""


@pytest.fixture
def start_copy():
    """A function that starts a slow copy as a process."""
    started = []

    def start(data, root):
        command = [sys.executable, "-c", _COPY, str(data), str(root)]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def test_a_killed_copy_resumes_and_ends_with_the_same_bytes(start_copy, shard_folder, tmp_path):
    folder = staged_folder(tmp_path, Index.load(shard_folder))
    process = start_copy(shard_folder, tmp_path)
    while not list(folder.glob("*.tar")):
        assert process.stdout.readline() == "block\n"
    while not list(folder.glob(".*.tar.partial")):
        assert process.stdout.readline() == "block\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    complete = tars(folder)
    assert list(folder.glob(".*.tar.partial")) and complete.items() < tars(shard_folder).items()
    assert not (folder / "index.json").exists()
    _, copy = run_copy(shard_folder, tmp_path)
    assert copy.skipped >= sum(map(len, complete.values())) > 0
    assert tars(folder) == tars(shard_folder) and verify_shards(folder) == [] and not list(folder.glob(".*.partial"))


def test_a_copy_is_stopped_between_two_blocks_and_resumes(shard_folder, tmp_path, monkeypatch):
    copy, blocks = Copy(shard_folder, tmp_path, threads=1), stage._blocks

    def stopping(source):
        for number, block in enumerate(blocks(source)):
            yield block
            if copy.copied > len(block) and number == 1:
                copy.stop()

    monkeypatch.setattr(stage, "_BLOCK", 4096)
    monkeypatch.setattr(stage, "_blocks", stopping)
    assert copy.run() is None and 0 < copy.copied < copy.total
    folder = staged_folder(tmp_path, Index.load(shard_folder))
    assert not list(folder.glob(".*.partial")) and not (folder / "index.json").exists()
    monkeypatch.setattr(stage, "_blocks", blocks)
    assert run_copy(shard_folder, tmp_path)[0] == folder and verify_shards(folder) == []


def test_two_copies_at_once_are_made_by_one_process_and_the_other_waits(start_copy, shard_folder, tmp_path):
    process = start_copy(shard_folder, tmp_path)
    assert process.stdout.readline() == "block\n"
    waiting = Copy(shard_folder, tmp_path)
    thread = threading.Thread(target=waiting.run)
    thread.start()
    until = time.monotonic() + 30
    while waiting.waits_for is None and time.monotonic() < until:
        time.sleep(0.005)
    assert waiting.waits_for == f"process {process.pid} on {socket.gethostname()}"
    text, _ = process.communicate()
    thread.join()
    assert text.endswith(f"{staged_folder(tmp_path, Index.load(shard_folder))}\n")
    assert waiting.skipped == waiting.total > 0


def test_a_copy_that_waits_for_another_can_be_stopped(start_copy, shard_folder, tmp_path):
    process = start_copy(shard_folder, tmp_path)
    assert process.stdout.readline() == "block\n"
    waiting = Copy(shard_folder, tmp_path)
    threading.Timer(0.3, waiting.stop).start()
    assert waiting.run() is None


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 1 MB of its own."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.decode().strip()}")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.fixture
def large(shard_folder, tmp_path):
    """Indexed shards of more than 1 MB."""
    folder = tmp_path / "large"
    shutil.copytree(shard_folder, folder)
    index = Index.load(folder)
    first = folder / index.shards[0].name
    first.write_bytes(first.read_bytes() + bytes(2 << 20))  # as tars that are padded
    with first.open("rb") as file:
        shard = replace(index.shards[0], bytes=first.stat().st_size, xxh3=digest(file))
    replace(index, shards=(shard, *index.shards[1:])).save()
    return folder


@pytest.mark.parametrize("is_late", [False, True], ids=["before copying", "while copying"])
def test_a_full_disk_is_an_error_that_states_the_missing_bytes(is_late, large, small_disk, monkeypatch):
    other = small_disk / "0123456789abcdef"
    other.mkdir()
    (other / MANIFEST).touch()
    if is_late:
        monkeypatch.setattr(Copy, "_check_space", lambda *_: None)
    with pytest.raises(InputError) as full:
        run_copy(large, small_disk)
    index = Index.load(large)
    folder = staged_folder(small_disk, index)
    needed = sum(s.bytes for s in index.shards) + index.table.nbytes
    expected = "no space left on the disk for its " if is_late else f"{needed} bytes are needed"
    assert expected in str(full.value) and "bytes are free" in str(full.value) and str(folder) in str(full.value)
    assert ("not enough disk space" in str(full.value)) != is_late and (str(other) in str(full.value)) != is_late
    assert not list(folder.glob(".*.partial")) and bool(list(folder.glob("*.tar"))) in (is_late, False)


@pytest.mark.parametrize(("error", "expected"), [("no index", "shards index"), ("no folder", "No such file")])
def test_what_has_no_index_is_refused(error, expected, tar_folder, tmp_path):
    with pytest.raises(DataError, match=expected):
        run_copy(tar_folder if error == "no index" else Path("/nowhere"), tmp_path)


def test_a_root_that_cannot_be_written_is_refused(shard_folder, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file"):
        run_copy(shard_folder, tmp_path / "file")


def test_a_file_system_without_locks_is_refused_with_what_to_do(shard_folder, tmp_path, monkeypatch):
    def lockf(handle, how):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.lockf", lockf)
    with pytest.raises(InputError, match=r"\.lock: this file system has no locks .*; give a --stage on the machine's own disk"):
        Copy(shard_folder, tmp_path).run()
