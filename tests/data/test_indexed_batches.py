"""Samples that cannot be used and workers that die: replaced or named, and every other batch as if nothing had happened."""

import faulthandler
import io
import os
import random
import re
import signal
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from fastmae import DataError
from fastmae.data.batch import LoaderConfig
from fastmae.data.loader import Loader
from fastmae.data.order import Order
from fastmae.images.recode import Recode
from fastmae.shards.build import write_shards
from fastmae.shards.index_tars import index_shards
from fastmae.shards.read import ShardReader
from tests.support.batches import N, damage, damage_samples, equal, joined, take
from tests.support.processes import is_alive, wait_until, workers_of


def crash_at(monkeypatch, samples):
    """Whichever process reads one of ``samples`` crashes."""
    view = ShardReader.view

    def crash(self, sample):
        if sample in samples:
            faulthandler.disable()  # or pytest's would print where
            os.kill(os.getpid(), signal.SIGSEGV)
        return view(self, sample)

    monkeypatch.setattr(ShardReader, "view", crash)


def wait_for_death(pid):
    for _ in range(100):
        if not Path(f"/proc/{pid}").exists():
            return True
        time.sleep(0.05)
    return False


def test_a_bad_sample_is_named_and_replaced_by_the_next_in_order(shard_folder, copy):
    damage_samples(copy, 1)
    good, found = (take(f, 7) for f in (shard_folder, copy))
    (line,) = {line for b in found for line in b.replaced}
    assert "shard-000000.tar: " in line and "photo_" in line and "do not match their checksum in the index" in line
    good_ids, ids = (joined(b, "sample_ids") for b in (good, found))
    place = good_ids.tolist().index(0)
    assert ids[place] == Order(N, 0).at(np.array([place + 1]))[0][0]
    assert torch.equal(torch.cat([good_ids[:place], good_ids[place + 1 :]]), torch.cat([ids[:place], ids[place + 1 :]]))
    assert equal(found, take(copy, 7, workers=2))


def test_more_bad_samples_than_the_budget_end_the_run(copy):
    damage_samples(copy, 20)
    with pytest.raises(DataError, match=r"17 of 37 samples cannot be used, more than the budget of 0\.10%") as caught:
        take(copy, 20)
    assert len(caught.value.__notes__) == 17 and all("do not match their checksum" in line for line in caught.value.__notes__)


def test_a_bad_sample_counts_once_however_often_it_comes_and_whoever_it_would_replace(copy):
    following = Order(N, 0).at(np.arange(8))[0]  # eight neighbours in the order of the first pass
    damage(copy, following)
    batches = take(copy, 5, batch_size=37)
    for batch in batches:
        assert len(batch.replaced) == len(set(batch.replaced)) == 8
        assert not set(batch.sample_ids.tolist()) & set(following.tolist())
    assert equal(batches, take(copy, 5, batch_size=37, workers=3))


@pytest.mark.parametrize("workers", [0, 2])
def test_data_that_is_all_bad_is_an_error_at_once(tmp_path, workers):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for i in range(3000):
            info = tarfile.TarInfo(f"{i}.jpg")
            info.size = 100
            tar.addfile(info, io.BytesIO(bytes(100)))
    index_shards(tmp_path)
    began = time.perf_counter()
    with pytest.raises(DataError, match="17 of 3000 samples cannot be used"):
        take(tmp_path, 1, batch_size=256, workers=workers)
    assert time.perf_counter() - began < 10


def test_samples_that_are_all_bad_are_an_error_whatever_the_budget(image_folder, tmp_path):
    write_shards(image_folder, tmp_path, Recode(resize=None))
    damage_samples(tmp_path, N)
    with pytest.raises(DataError, match="37 of 37 samples cannot be used"):
        take(tmp_path, 1, bad_budget=1.0)


def test_a_worker_that_is_stuck_is_named_and_ended_with_the_loader(shard_folder, monkeypatch):
    view = ShardReader.view
    monkeypatch.setattr(ShardReader, "view", lambda self, sample: time.sleep(600) if sample == 5 else view(self, sample))
    config = LoaderConfig(image_size=(16, 16), workers=1, timeout=1.0)
    with pytest.raises(DataError, match=r"no data for 1 s; loader workers: pid \d+ at .*shard-.*tar: offset \d+") as caught:
        for _ in Loader(shard_folder, config, batch_size=6):
            pass
    assert wait_for_death(re.search(r"pid (\d+)", str(caught.value))[1])


def test_a_shard_that_vanishes_is_one_clear_error_from_a_worker(copy):
    loader = Loader(copy, LoaderConfig(image_size=(16, 16), workers=1), batch_size=6)
    (copy / "shard-000002.tar").unlink()
    with pytest.raises(DataError, match=r"^[^\n]*shard-000002.tar: cannot be read, No such file[^\n]*$"):
        for number, _ in enumerate(loader):
            assert number < 10


def test_workers_killed_ten_times_at_random_moments_change_nothing(shard_folder):
    chance = random.Random(1)
    expected = take(shard_folder, 80, batch_size=16)
    source = iter(Loader(shard_folder, LoaderConfig(image_size=(16, 16), workers=2), batch_size=16))
    found, notes, killed = [], [], []
    for _ in range(80):
        batch = next(source)
        found.append(batch)
        notes += batch.notes
        pids = workers_of(source)
        if len(killed) < 10 and all(is_alive(pid) for pid in pids):
            time.sleep(chance.uniform(0, 0.02))
            killed.append(chance.choice(pids))
            os.kill(killed[-1], signal.SIGKILL)
            assert wait_until(lambda: not is_alive(killed[-1]))
    source.close()
    assert equal(found, expected)
    assert len(killed) == len(notes) == 10
    assert all(f"(pid {pid})" in note and "was killed by SIGKILL" in note for pid, note in zip(killed, notes, strict=True))


def test_workers_killed_together_are_each_told(shard_folder):
    source = iter(Loader(shard_folder, LoaderConfig(image_size=(16, 16), workers=3), batch_size=16))
    next(source)
    pids = workers_of(source)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    assert wait_until(lambda: not any(map(is_alive, pids)))
    notes = [note for _ in range(12) for note in next(source).notes]
    source.close()
    assert len(notes) == 3 and all(any(f"(pid {pid})" in note for note in notes) for pid in pids)


def test_workers_that_go_on_dying_end_the_run_with_a_reason(shard_folder, monkeypatch):
    monkeypatch.setattr(ShardReader, "view", lambda self, sample: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(
        DataError, match=r"4 loader workers died while one batch was made; .*; the last at .*: offset \d+ was killed"
    ):
        take(shard_folder, 1, workers=1)


def test_samples_that_crash_their_decoder_are_replaced(shard_folder, monkeypatch):
    lethal = Order(N, 0).at(np.array([2, 3, 20]))[0].tolist()  # two of them in one batch, side by side
    crash_at(monkeypatch, lethal)
    found = take(shard_folder, 7, workers=2)
    lines = {line for b in found for line in b.replaced}
    assert len(lines) == 3 and all("crashes the process that decodes it" in line for line in lines)
    ids, places = joined(found, "sample_ids"), Order(N, 0).at(np.arange(42))[0]
    places[2], places[3], places[20] = places[4], places[4], places[21]
    again = [p for p in range(37, 42) if places[p] in lethal]
    expected = [i for i, p in enumerate(range(42)) if p not in again]
    assert ids[expected].tolist() == places[expected].tolist()
    assert sum("killed by SIGSEGV" in n for b in found for n in b.notes) >= 6


def test_a_bad_sample_that_would_replace_a_crashing_one_condemns_nobody_else(copy, monkeypatch):
    lethal, bad, good = Order(N, 0).at(np.arange(2, 5))[0].tolist()
    damage(copy, [bad])
    crash_at(monkeypatch, [lethal])
    for _ in range(5):  # which of two tasks comes first is chance
        found = take(copy, 3, batch_size=12, workers=3, prefetch=3)
        assert len({line for b in found for line in b.replaced}) == 2
        assert joined(found, "sample_ids")[2:5].tolist() == [good] * 3


def test_an_error_of_the_disk_names_shard_and_offset(shard_folder, monkeypatch):
    def fail(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    for workers in (0, 1):
        with pytest.raises(DataError, match=r"shard-00000\d.tar: offset \d+: cannot be read, Input/output error"):
            take(shard_folder, 1, workers=workers)
