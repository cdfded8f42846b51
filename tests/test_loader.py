"""Batches: every sample once per epoch, the same whatever the ranks and workers, and bad samples replaced in the open."""

import faulthandler
import io
import os
import random
import re
import shutil
import signal
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from fastmae import DataError, InputError
from fastmae.data.augment import DRAWS, Augment, crop_box, resized_crop
from fastmae.data.batch import Batch, LoaderConfig
from fastmae.data.decode import decode
from fastmae.data.foreign import index_shards
from fastmae.data.index import Index
from fastmae.data.loader import Loader
from fastmae.data.order import Order
from fastmae.data.read import ShardReader
from fastmae.data.recode import Recode
from fastmae.data.write import write_shards
from fastmae.kernels.philox import CROPS, uniform
from tests.test_pool import is_alive, wait_until

N = 37


def take(data, batches, *, batch_size=6, rank=0, world_size=1, start=0, **config):
    config = LoaderConfig(**{"image_size": (16, 16), "workers": 0, **config})
    place = {"batch_size": batch_size, "rank": rank, "world_size": world_size}
    state = Loader(data, config, **place).state(start)
    source = iter(Loader(data, config, **place, state=state))
    found = [next(source) for _ in range(batches)]
    source.close()
    return found


def joined(batches, field):
    return torch.cat([getattr(b, field) for b in batches])


def joined_batch(batches):
    return Batch(*(joined(batches, field) for field in Batch._fields[:4]))


def equal(one, two):
    return all(torch.equal(a, b) for x, y in zip(one, two, strict=True) for a, b in zip(x[:4], y[:4], strict=True))


def test_every_sample_comes_once_per_epoch_and_epochs_differ(shard_folder):
    batches = take(shard_folder, 19)  # three epochs and a bit
    ids, epochs = joined(batches, "sample_ids"), joined(batches, "epochs")
    orders = [ids[epochs == e].tolist() for e in range(3)]
    assert all(sorted(o) == list(range(N)) for o in orders)
    assert orders[0] != orders[1] != orders[2]


@pytest.fixture(scope="module")
def whole(shard_folder):
    """Five global batches of 24: more than three epochs of one rank in its own process."""
    return take(shard_folder, 5, batch_size=24)


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_ranks_and_workers_change_nothing(world_size, workers, shard_folder, whole):
    share = {"batch_size": 24 // world_size, "world_size": world_size, "workers": workers}
    parts = [take(shard_folder, 5, rank=r, **share) for r in range(world_size)]
    for number, batch in enumerate(whole):
        for field in ("images", "sample_ids", "epochs", "labels"):
            assert torch.equal(getattr(batch, field), torch.cat([getattr(p[number], field) for p in parts]))


@pytest.mark.parametrize("done", range(1, 9))
@pytest.mark.parametrize("world_size", [1, 3])
def test_a_start_at_any_batch_continues_the_order_on_any_number_of_ranks(shard_folder, done, world_size):
    rest = take(shard_folder, 9)[done:]
    parts = [take(shard_folder, 9 - done, batch_size=6 // world_size, rank=r, world_size=world_size, start=6 * done)
             for r in range(world_size)]  # fmt: skip
    assert equal(rest, [joined_batch([p[number] for p in parts]) for number in range(9 - done)])


def test_an_uneven_split_of_shards_gives_every_rank_as_many_batches(image_folder, tmp_path):
    index, _ = write_shards(image_folder, tmp_path / "seven", Recode(resize=16), samples_per_shard=6)
    assert len(index.shards) == 7
    found = [take(tmp_path / "seven", 37, batch_size=1, rank=r, world_size=3) for r in range(3)]
    ids = torch.stack([joined(f, "sample_ids") for f in found], dim=1).flatten()
    assert all(sorted(ids[37 * e : 37 * (e + 1)].tolist()) == list(range(N)) for e in range(3))


def test_one_shard_keeps_eight_workers_busy(image_folder, tmp_path):
    write_shards(image_folder, tmp_path / "one", Recode(resize=16), samples_per_shard=100)
    assert equal(take(tmp_path / "one", 5, batch_size=37), take(tmp_path / "one", 5, batch_size=37, workers=8))


def test_seed_changes_order_and_crops(shard_folder):
    one, two = (take(shard_folder, 1, batch_size=N, seed=s)[0] for s in (0, 1))
    assert not torch.equal(one.sample_ids, two.sample_ids)
    assert not (one.images[one.sample_ids.argsort()] == two.images[two.sample_ids.argsort()]).flatten(1).all(1).any()


def test_a_samples_crop_depends_on_its_epoch(shard_folder):
    batches = take(shard_folder, 13)
    ids, epochs, images = (joined(batches, f) for f in ("sample_ids", "epochs", "images"))
    first, second = (images[(ids == 5) & (epochs == e)] for e in (0, 1))
    assert len(first) == len(second) == 1 and not torch.equal(first, second)


def test_labels_and_shapes_are_those_of_the_index(shard_folder):
    (batch,) = take(shard_folder, 1, image_size=(24, 40), channels=1)
    assert batch.images.shape == (6, 1, 24, 40) and batch.images.dtype == torch.uint8
    assert torch.equal(
        batch.labels, torch.from_numpy(Index.load(shard_folder).table["label"].astype(np.int64))[batch.sample_ids]
    )


def test_crops_are_those_of_the_samples_own_pixels_and_keys(shard_folder):
    reader = ShardReader(Index.load(shard_folder))
    for batch in take(shard_folder, 3):
        for image, sample, epoch in zip(batch.images, batch.sample_ids, batch.epochs, strict=True):
            pixels = decode(reader.read(int(sample)))
            draws = uniform(0, CROPS, epoch[None], sample[None], DRAWS)[0].numpy()
            box = crop_box(draws, *pixels.shape[:2], Augment())
            assert torch.equal(image, resized_crop(pixels, box, (16, 16), flip=draws[0] < 0.5))


def damage_samples(folder, count):
    """Overwrite the middle of ``count`` JPEGs inside their tars, lengths unchanged."""
    index = Index.load(folder)
    for row in index.table[:count]:
        with (folder / index.shards[row["shard"]].name).open("r+b") as file:
            file.seek(int(row["offset"]) + 2)
            file.write(bytes(int(row["size"]) - 2))


def test_a_bad_sample_is_named_and_replaced_by_the_next_in_order(shard_folder, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(shard_folder, folder)
    damage_samples(folder, 1)
    good, found = (take(f, 7) for f in (shard_folder, folder))
    (line,) = {line for b in found for line in b.replaced}
    assert "shard-000000.tar: " in line and "photo_" in line and "are not those that were indexed" in line
    good_ids, ids = (joined(b, "sample_ids") for b in (good, found))
    place = good_ids.tolist().index(0)
    assert ids[place] == Order(N, 0).at(np.array([place + 1]))[0][0]
    assert torch.equal(torch.cat([good_ids[:place], good_ids[place + 1 :]]), torch.cat([ids[:place], ids[place + 1 :]]))
    assert equal(found, take(folder, 7, workers=2))


def test_more_bad_samples_than_the_budget_end_the_run(shard_folder, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(shard_folder, folder)
    damage_samples(folder, 20)
    with pytest.raises(DataError, match=r"17 of 37 samples cannot be used, more than the budget of 0\.10%") as caught:
        take(folder, 20)
    assert len(caught.value.__notes__) == 17 and all("(checksum)" in line for line in caught.value.__notes__)


def test_a_bad_sample_counts_once_however_often_it_comes_and_whoever_it_would_replace(shard_folder, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(shard_folder, folder)
    index, following = Index.load(folder), Order(N, 0).at(np.arange(8))[0]
    for row in index.table[following]:  # eight neighbours in the order of the first pass
        with (folder / index.shards[row["shard"]].name).open("r+b") as file:
            file.seek(int(row["offset"]) + 2)
            file.write(bytes(int(row["size"]) - 2))
    batches = take(folder, 5, batch_size=37)
    for batch in batches:
        assert len(batch.replaced) == len(set(batch.replaced)) == 8
        assert not set(batch.sample_ids.tolist()) & set(following.tolist())
    assert equal(batches, take(folder, 5, batch_size=37, workers=3))


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


def wait_for_death(pid):
    for _ in range(100):
        if not Path(f"/proc/{pid}").exists():
            return True
        time.sleep(0.05)
    return False


def test_a_worker_that_is_stuck_is_named_and_ended_with_the_loader(shard_folder, monkeypatch):
    view = ShardReader.view
    monkeypatch.setattr(ShardReader, "view", lambda self, sample: time.sleep(600) if sample == 5 else view(self, sample))
    config = LoaderConfig(image_size=(16, 16), workers=1, timeout=1.0)
    with pytest.raises(DataError, match=r"no data for 1 s; loader workers: pid \d+ at .*shard-.*tar: offset \d+") as caught:
        for _ in Loader(shard_folder, config, batch_size=6):
            pass
    assert wait_for_death(re.search(r"pid (\d+)", str(caught.value))[1])


def test_a_shard_that_vanishes_is_one_clear_error_from_a_worker(shard_folder, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(shard_folder, folder)
    loader = Loader(folder, LoaderConfig(image_size=(16, 16), workers=1), batch_size=6)
    (folder / "shard-000002.tar").unlink()
    with pytest.raises(DataError, match=r"^[^\n]*shard-000002.tar: cannot be read, No such file[^\n]*$"):
        for number, _ in enumerate(loader):
            assert number < 10


def workers_of(source):
    """Pids of the workers behind a running iterator of a Loader."""
    return source.gi_frame.f_locals["source"].gi_frame.f_locals["source"]._pool.pids


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


def test_workers_that_go_on_dying_end_the_run_with_a_reason(shard_folder, monkeypatch):
    monkeypatch.setattr(ShardReader, "view", lambda self, sample: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(
        DataError, match=r"4 loader workers died while one batch was made; .*; the last at .*: offset \d+ was killed"
    ):
        take(shard_folder, 1, workers=1)


def test_samples_that_crash_their_decoder_are_replaced(shard_folder, monkeypatch):
    lethal = Order(N, 0).at(np.array([2, 3, 20]))[0].tolist()  # two of them in one batch, side by side
    view = ShardReader.view

    def crash(self, sample):
        if sample in lethal:
            faulthandler.disable()
            os.kill(os.getpid(), signal.SIGSEGV)
        return view(self, sample)

    monkeypatch.setattr(ShardReader, "view", crash)
    found = take(shard_folder, 7, workers=2)
    lines = {line for b in found for line in b.replaced}
    assert len(lines) == 3 and all("crashes the process that decodes it" in line for line in lines)
    ids, places = joined(found, "sample_ids"), Order(N, 0).at(np.arange(42))[0]
    places[2], places[3], places[20] = places[4], places[4], places[21]
    again = [p for p in range(37, 42) if places[p] in lethal]
    expected = [i for i, p in enumerate(range(42)) if p not in again]
    assert ids[expected].tolist() == places[expected].tolist()
    assert sum("killed by SIGSEGV" in n for b in found for n in b.notes) >= 6


def test_a_bad_sample_that_would_replace_a_crashing_one_condemns_nobody_else(shard_folder, tmp_path, monkeypatch):
    folder = tmp_path / "copy"
    shutil.copytree(shard_folder, folder)
    lethal, bad, good = Order(N, 0).at(np.arange(2, 5))[0].tolist()
    index = Index.load(folder)
    row = index.table[bad]
    with (folder / index.shards[row["shard"]].name).open("r+b") as file:
        file.seek(int(row["offset"]) + 2)
        file.write(bytes(100))
    view = ShardReader.view

    def crash(self, sample):
        if sample == lethal:
            faulthandler.disable()
            os.kill(os.getpid(), signal.SIGSEGV)
        return view(self, sample)

    monkeypatch.setattr(ShardReader, "view", crash)
    for _ in range(5):  # which of two tasks comes first is chance
        found = take(folder, 3, batch_size=12, workers=3, prefetch=3)
        assert len({line for b in found for line in b.replaced}) == 2
        assert joined(found, "sample_ids")[2:5].tolist() == [good] * 3


@pytest.mark.parametrize("size", [(16, 16), (96, 80)])
def test_cropping_on_the_device_differs_by_rounding_alone(shard_folder, size):
    on_cpu, on_device = (take(shard_folder, 7, image_size=size, crop=c) for c in ("cpu", "device"))
    difference = (joined(on_cpu, "images").float() - joined(on_device, "images").float()).abs()
    # On the CPU the filter rounds and clamps between its two passes, as Pillow's does: at sharp edges it shows.
    assert difference.mean() < 0.3 and (difference > 2).float().mean() < 1e-3
    assert torch.equal(joined(on_cpu, "sample_ids"), joined(on_device, "sample_ids"))
    assert equal(on_device, take(shard_folder, 7, image_size=size, crop="device", workers=2))


def test_crops_too_large_for_their_place_are_resized_by_the_worker(shard_folder, monkeypatch):
    whole = take(shard_folder, 4, crop="device")
    monkeypatch.setattr("fastmae.data.indexed.region_bytes", lambda index, config: 1500)
    small = take(shard_folder, 4, crop="device")
    difference = (joined(whole, "images").float() - joined(small, "images").float()).abs()
    assert 0 < difference.mean() < 0.3 and (difference > 2).float().mean() < 1e-3


def test_views_are_crops_of_their_own_of_one_decoded_image(shard_folder, monkeypatch):
    decoded = []
    monkeypatch.setattr("fastmae.data.crops.decode", lambda *a: decoded.append(1) or decode(*a))
    batches = take(shard_folder, 4, batch_size=8, views=2)
    assert len(decoded) == 16
    for batch in batches:
        assert torch.equal(batch.sample_ids[::2], batch.sample_ids[1::2])
        assert torch.equal(batch.epochs[::2] + 1, batch.epochs[1::2])
        assert not (batch.images[::2] == batch.images[1::2]).flatten(1).all(1).any()
    assert equal(batches, take(shard_folder, 4, batch_size=8, views=2, workers=3))


def test_a_shuffle_window_keeps_exact_order_and_resume(shard_folder):
    whole = take(shard_folder, 9, shuffle_window=2)
    assert sorted(joined(whole, "sample_ids")[:N].tolist()) == list(range(N))
    assert equal(whole[4:], take(shard_folder, 5, shuffle_window=2, start=24, workers=2))


def test_image_sizes_follow_their_schedule_without_new_workers(shard_folder):
    config = LoaderConfig(image_size=(16, 16), sizes=((24, (24, 32)), (36, (32, 32))), workers=2)
    source = iter(Loader(shard_folder, config, batch_size=3, rank=1, world_size=2))
    next(source)
    pids = workers_of(source)
    shapes = [tuple(next(source).images.shape[2:]) for _ in range(8)]
    assert shapes == [(16, 16)] * 3 + [(24, 32)] * 2 + [(32, 32)] * 3 and workers_of(source) == pids
    source.close()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"fingerprint": "0123"},
            r"other data than this run began with, fingerprint [0-9a-f]{16} here and 0123 in the checkpoint",
        ),
        ({"seed": 1}, "made with seed 1, not 0"),
        ({"views": 2}, "made with views 2, not 1"),
        ({"shuffle_window": 3}, "made with shuffle_window 3, not None"),
    ],
)
def test_a_place_in_another_order_is_refused(shard_folder, change, says):
    state = Loader(shard_folder, LoaderConfig(), batch_size=1).state(10)
    with pytest.raises(InputError, match=says):
        Loader(shard_folder, LoaderConfig(), batch_size=1, state={**state, **change})


def test_an_error_of_the_disk_names_shard_and_offset(shard_folder, monkeypatch):
    def fail(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    for workers in (0, 1):
        with pytest.raises(DataError, match=r"shard-00000\d.tar: offset \d+: cannot be read, Input/output error"):
            take(shard_folder, 1, workers=workers)


def test_batches_do_not_lie_under_dev_shm(shard_folder):
    """Whose size containers limit: their memory is a file without a name."""
    source = iter(Loader(shard_folder, LoaderConfig(image_size=(16, 16), workers=2), batch_size=6))
    batch = next(source)
    lines = [line for line in Path("/proc/self/maps").read_text().splitlines() if "fastmae-batches" in line]
    source.close()
    assert any(
        int(line.split("-")[0], 16) <= batch.images.data_ptr() < int(line.split("-")[1].split()[0], 16) for line in lines
    )
    assert all("/memfd:" in line for line in lines)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"views": 0}, "views and the shuffle window must be >= 1"),
        ({"crop": "gpu"}, "crop must be one of auto, cpu, device and decode one of cpu, nvjpeg, got 'gpu' and 'cpu'"),
        ({"sizes": ((5, (8, 8)), (5, (9, 9)))}, "first positions rise"),
        ({"workers": -1}, "workers must be >= 0"),
        ({"channels": 4}, "images from files have 1 or 3 channels"),
    ],
)
def test_settings_that_cannot_work_are_named(fields, says):
    with pytest.raises(InputError, match=says):
        LoaderConfig(**fields)


@pytest.mark.gpu
@pytest.mark.parametrize("crop", ["cpu", "device"])
def test_batches_on_a_gpu_are_those_on_the_cpu(shard_folder, crop):
    config = LoaderConfig(image_size=(32, 48), workers=2, crop=crop, prefetch=2)
    sources = [iter(Loader(shard_folder, config, batch_size=6, device=d)) for d in ("cpu", "cuda")]
    for _ in range(40):  # many more than there are slots
        on_cpu, on_gpu = (next(source) for source in sources)
        assert on_gpu.images.is_cuda and all(torch.equal(a, b.cpu()) for a, b in zip(on_cpu[1:4], on_gpu[1:4], strict=True))
        difference = (on_cpu.images.float() - on_gpu.images.cpu().float()).abs()
        assert difference.max() <= (0 if crop == "cpu" else 1)
    for source in sources:
        source.close()
