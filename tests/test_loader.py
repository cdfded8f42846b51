"""Batches: every sample once per epoch, the same whatever the ranks and workers, and bad samples replaced in the open."""

import shutil
import time
from multiprocessing import active_children

import numpy as np
import pytest
import torch

from fastmae import DataError
from fastmae.data.augment import DRAWS, Augment, crop_box, resized_crop
from fastmae.data.batch import LoaderConfig
from fastmae.data.decode import decode
from fastmae.data.index import Index
from fastmae.data.indexed import IndexedBatches
from fastmae.data.loader import Loader
from fastmae.data.order import Order, batch_positions
from fastmae.data.read import ShardReader
from fastmae.data.recode import Recode
from fastmae.data.write import write_shards
from fastmae.kernels.philox import CROPS, uniform

N = 37
original = IndexedBatches.__getitem__


def take(data, batches, *, batch_size=6, rank=0, world_size=1, start=0, **config):
    loader = Loader(data, LoaderConfig(**{"image_size": (16, 16), "workers": 0, **config}),
                    batch_size=batch_size, rank=rank, world_size=world_size, start=start)  # fmt: skip
    source = iter(loader)
    found = [next(source) for _ in range(batches)]
    source.close()
    return found


def joined(batches, field):
    return torch.cat([getattr(b, field) for b in batches])


def equal(one, two):
    return all(torch.equal(a, b) for x, y in zip(one, two, strict=True) for a, b in zip(x[:4], y[:4], strict=True))


def test_every_sample_comes_once_per_epoch_and_epochs_differ(shard_folder):
    batches = take(shard_folder, 19)  # three epochs and a bit
    ids, epochs = joined(batches, "sample_ids"), joined(batches, "epochs")
    orders = [ids[epochs == e].tolist() for e in range(3)]
    assert all(sorted(o) == list(range(N)) for o in orders)
    assert orders[0] != orders[1] != orders[2]


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_change_nothing(shard_folder, workers):
    assert equal(take(shard_folder, 9), take(shard_folder, 9, workers=workers))


@pytest.mark.parametrize("world_size", [2, 3, 6])
def test_world_size_changes_nothing(shard_folder, world_size):
    whole = take(shard_folder, 9, batch_size=6)
    parts = [take(shard_folder, 9, batch_size=6 // world_size, rank=r, world_size=world_size) for r in range(world_size)]
    for number, batch in enumerate(whole):
        for field in ("images", "sample_ids", "epochs", "labels"):
            assert torch.equal(getattr(batch, field), torch.cat([getattr(p[number], field) for p in parts]))


@pytest.mark.parametrize("done", range(1, 9))
def test_a_start_at_any_batch_continues_the_order(shard_folder, done):
    assert equal(take(shard_folder, 9)[done:], take(shard_folder, 9 - done, start=6 * done))


def test_seed_changes_order_and_crops(shard_folder):
    one, two = (joined(take(shard_folder, 6, seed=s), "sample_ids") for s in (0, 1))
    assert not torch.equal(one, two)


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


@pytest.mark.parametrize(("n", "positions"), [(5, np.arange(23)), (1, np.arange(4)), (1000, np.arange(990, 2010))])
def test_order_is_a_permutation_of_each_epoch(n, positions):
    ids, epochs = Order(n, 0).at(positions)
    assert (epochs == positions // n).all()
    for epoch in np.unique(epochs):
        assert len(np.unique(ids[epochs == epoch])) == (epochs == epoch).sum()


def test_ranks_and_micro_batches_tile_the_positions():
    tiles = [batch_positions(m, 4, r, 3, start=100) for m in range(2) for r in range(3)]
    assert np.concatenate(tiles).tolist() == list(range(100, 124))


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
    assert "shard-000000.tar: " in line and "photo_" in line and "cannot be decoded" in line
    good_ids, ids = (joined(b, "sample_ids") for b in (good, found))
    place = good_ids.tolist().index(0)
    assert ids[place] == Order(N, 0).at(np.array([place + 1]))[0][0]
    assert torch.equal(torch.cat([good_ids[:place], good_ids[place + 1 :]]), torch.cat([ids[:place], ids[place + 1 :]]))
    assert equal(found, take(folder, 7, workers=2))


def test_more_bad_samples_than_the_budget_end_the_run(shard_folder, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(shard_folder, folder)
    damage_samples(folder, 20)
    with pytest.raises(DataError, match=r"17 of \d+ samples could not be used, more than the budget of 0\.10%"):
        take(folder, 20)


def test_samples_that_are_all_bad_are_an_error_not_a_hang(image_folder, tmp_path):
    write_shards(image_folder, tmp_path, Recode(resize=None))
    damage_samples(tmp_path, N)
    with pytest.raises(DataError, match="no sample can be decoded"):
        take(tmp_path, 1)


def test_a_worker_that_is_stuck_is_ended_with_the_loader(shard_folder, monkeypatch):
    monkeypatch.setattr(IndexedBatches, "__getitem__", lambda self, m: original(self, m) if m < 1 else time.sleep(600))
    loader = Loader(shard_folder, LoaderConfig(image_size=(16, 16), workers=1), batch_size=6)
    source = iter(loader)
    next(source)
    (worker,) = active_children()
    source.close()
    worker.join(5)
    assert not worker.is_alive()


def test_a_shard_that_vanishes_is_one_clear_error_from_a_worker(shard_folder, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(shard_folder, folder)
    loader = Loader(folder, LoaderConfig(image_size=(16, 16), workers=1), batch_size=6)
    (folder / "shard-000002.tar").unlink()
    with pytest.raises(DataError, match=r"^[^\n]*shard-000002.tar: cannot be read, No such file[^\n]*$"):
        for number, _ in enumerate(loader):
            assert number < 10
