"""Runs that read a staged copy: the same bits as without, one copy per machine, and ends that all processes hear of."""

import os
import signal
import threading
import time
from functools import partial
from pathlib import Path

import pytest

from fastmae.errors import DataError, InputError
from fastmae.shards import stage
from fastmae.shards.index import Index
from fastmae.shards.staged import staged_folder
from fastmae.train.distributed.signals import StopSignals
from fastmae.train.distributed.watch import Watch
from fastmae.train.pretrain import staging
from fastmae.train.pretrain.pretrain import pretrain
from fastmae.train.pretrain.staging import stage_data
from tests.support.crew import Crew
from tests.support.runs import RECIPE, assert_same_bits, records, run_of, signal_after

_WORLD = staging.World(0, 1, None)


class Watched:
    """In the place of a watch: what it is told."""

    def __init__(self):
        self.told = []

    def alive(self, doing):
        self.told.append(doing)


def stage_once(data, root, signals=None):
    watch = Watched()
    return stage_data(run_of(data, root / "run", stage=root / "disk"), _WORLD, watch, signals or StopSignals()), watch


def test_a_run_from_a_copy_has_the_bits_of_one_without_and_goes_on_without(shard_folder, copy, tmp_path, monkeypatch):
    whole = pretrain(RECIPE, run_of(shard_folder, tmp_path / "whole"))
    stage_once(copy, tmp_path)
    for path in copy.glob("*.tar"):
        path.write_bytes(bytes(path.stat().st_size))  # nothing of the original can be read any more
    with monkeypatch.context() as patch:
        signal_after(patch, 3)
        pretrain(RECIPE, run_of(copy, tmp_path / "run", stage=tmp_path / "disk"))
    (start,) = [r for r in records(tmp_path / "run") if r.get("event") == "start"]
    assert start["run"]["data"] == str(copy)  # the record is of the original
    last = pretrain(RECIPE, run_of(shard_folder, tmp_path / "run"))
    assert last.name == "step-0000006"
    assert_same_bits(last, whole)


def test_the_copy_is_read_and_not_the_original(shard_folder, tmp_path):
    (data, lines), watch = stage_once(shard_folder, tmp_path)
    assert data == str(staged_folder(tmp_path / "disk", Index.load(shard_folder)))
    assert lines[0].startswith(f"data: staged in {data}, 0.00 of 0.00 GB copied in ") and watch.told
    assert stage_once(shard_folder, tmp_path)[0][1] == [f"data: staged in {data}, copied before"]


def test_what_is_no_folder_of_indexed_shards_is_refused_with_what_to_do(tar_folder, tmp_path):
    with pytest.raises(InputError, match=r"has no index\.json: `fastmae shards index` makes one"):
        stage_once(tar_folder, tmp_path)
    with pytest.raises(InputError, match="streams are read where they are, without --stage"):
        stage_once("https://example.org/{000..009}.tar", tmp_path)


def test_a_signal_ends_the_copy_and_the_run_reads_the_original(shard_folder, tmp_path, monkeypatch):
    signals, blocks = StopSignals(), stage._blocks

    def slow(source):
        for block in blocks(source):
            signals.received = "SIGTERM"
            time.sleep(0.3)
            yield block

    monkeypatch.setattr(stage, "_blocks", slow)
    (data, lines), _ = stage_once(shard_folder, tmp_path, signals)
    assert data == str(shard_folder) and "was interrupted; the next start continues it" in lines[0]
    monkeypatch.setattr(stage, "_blocks", blocks)
    assert stage_once(shard_folder, tmp_path)[0][0] != str(shard_folder)


def test_a_line_is_written_while_it_goes_on(shard_folder, tmp_path, monkeypatch, capsys):
    blocks = stage._blocks

    def slow(source):
        for block in blocks(source):
            yield block
            time.sleep(0.2)

    monkeypatch.setattr(stage, "_blocks", slow)
    monkeypatch.setattr(staging, "_LOOKS_PER_LINE", 2)
    stage_once(shard_folder, tmp_path)
    line = capsys.readouterr().out.splitlines()[0]
    assert line.startswith("staging: 0.00 of 0.00 GB, ") and line.endswith("GB/s")


def test_a_fault_of_the_copy_reaches_the_main_thread(copy, tmp_path, monkeypatch):
    (copy / Index.load(copy).shards[0].name).write_bytes(bytes((copy / Index.load(copy).shards[0].name).stat().st_size))
    with pytest.raises(DataError, match="does not match its index"):
        stage_once(copy, tmp_path)
    monkeypatch.setattr(stage.Copy, "run", lambda self: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        stage_once(copy, tmp_path)


def test_progress_of_a_copy_keeps_the_watch_from_ending_the_run_and_its_end_does_not(tmp_path, monkeypatch):
    ended = threading.Event()
    monkeypatch.setattr(Watch, "_abort", lambda self, waited: ended.set())
    monkeypatch.setattr("fastmae.train.distributed.watch._TICK", 0.02)
    watch = Watch(_WORLD, tmp_path, first=0.4, later=0.4)
    for _ in range(16):
        watch.alive("staging shards")
        assert not ended.wait(0.05)
    assert watch.doing == "staging shards" and ended.wait(10)
    watch.end()


def own_disk(folder, local, rank):
    """Each machine has a disk of its own: the same path, another folder; and what it copies is noted."""
    os.chdir(folder / f"machine-{rank // local}")
    copy = stage.Copy._shard

    def noted(self, *arguments):
        with Path(f"copied-by-{rank}").open("a") as file:
            file.write(".")
        return copy(self, *arguments)

    stage.Copy._shard = noted


@pytest.mark.cluster
def test_each_machine_copies_once(shard_folder, tmp_path):
    for machine in (0, 1):
        (tmp_path / f"machine-{machine}").mkdir()
    flags = ("--stage", "disk", "--steps", "1", "--warmup-epochs", "0")
    with Crew(4, shard_folder, tmp_path / "run", *flags, local=2, fault=partial(own_disk, tmp_path, 2)) as crew:
        assert crew.end() == [0] * 4, crew.text()
        assert "data: staged in disk/" in crew.text(0)
    assert sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("copied-by-*")) == [
        "machine-0/copied-by-0", "machine-1/copied-by-2"
    ]  # fmt: skip
    for machine in (0, 1):
        copied = staged_folder(tmp_path / f"machine-{machine}" / "disk", Index.load(shard_folder))
        assert Index.load(copied).fingerprint == Index.load(shard_folder).fingerprint


def full_disk(on, rank):
    if rank == on:
        stage.Copy._check_space = lambda self, *_: (_ for _ in ()).throw(InputError("no room for the copy here"))


@pytest.mark.cluster
def test_a_copy_that_fails_on_one_machine_ends_all_with_its_reason(shard_folder, tmp_path):
    flags = ("--stage", tmp_path / "disk", "--steps", "1", "--warmup-epochs", "0")
    with Crew(2, shard_folder, tmp_path / "run", *flags, local=1, fault=partial(full_disk, 1)) as crew:
        assert crew.end() == [2, 2], crew.text()
        assert "fastmae: no room for the copy here (on another rank)" in crew.text(0), crew.text()
        assert "fastmae: no room for the copy here\n" in crew.text(1), crew.text()


@pytest.mark.cluster
def test_a_signal_while_shards_are_copied_ends_the_run_well(shard_folder, tmp_path):
    flags = ("--stage", tmp_path / "disk", "--steps", "9", "--requeue-exit")
    with Crew(2, shard_folder, tmp_path / "run", *flags, fault=lasting) as crew:
        crew.wait_for(lambda: list((tmp_path / "disk").glob("*/.*.partial")))
        crew.send(signal.SIGTERM, 1)
        assert crew.end() == [85, 85], crew.text()
        assert "was interrupted; the next start continues it" in crew.text(0)
    assert not list((tmp_path / "disk").glob("*/.*.partial"))


def lasting(rank):
    """A copy takes many seconds, block by block."""
    blocks = stage._blocks
    stage._BLOCK = 1024

    def slow(source):
        for block in blocks(source):
            yield block
            time.sleep(0.2)

    stage._blocks = slow
