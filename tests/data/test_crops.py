"""Crops: on the CPU or on the device, one or more of an image, each from its own pixels and numbers."""

import pytest
import torch

from fastmae.data.augment import DRAWS, Augment, crop_box
from fastmae.data.batch import LoaderConfig
from fastmae.data.loader import Loader
from fastmae.images.decode import decode
from fastmae.images.resize import resized_crop
from fastmae.kernels.philox import CROPS, uniform
from fastmae.shards.index import Index
from fastmae.shards.read import ShardReader
from tests.support.batches import equal, joined, take
from tests.support.processes import workers_of


def test_crops_are_those_of_the_samples_own_pixels_and_keys(shard_folder):
    reader = ShardReader(Index.load(shard_folder))
    for batch in take(shard_folder, 3):
        for image, sample, epoch in zip(batch.images, batch.sample_ids, batch.epochs, strict=True):
            pixels = decode(reader.read(int(sample)))
            draws = uniform(0, CROPS, epoch[None], sample[None], DRAWS)[0].numpy()
            box = crop_box(draws, *pixels.shape[:2], Augment())
            assert torch.equal(image, resized_crop(pixels, box, (16, 16), flip=draws[0] < 0.5))


def test_a_samples_crop_depends_on_its_epoch(shard_folder):
    batches = take(shard_folder, 13)
    ids, epochs, images = (joined(batches, f) for f in ("sample_ids", "epochs", "images"))
    first, second = (images[(ids == 5) & (epochs == e)] for e in (0, 1))
    assert len(first) == len(second) == 1 and not torch.equal(first, second)


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
    monkeypatch.setattr("fastmae.data.indexed_batches.region_bytes", lambda index, config: 1500)
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


def test_image_sizes_follow_their_schedule_without_new_workers(shard_folder):
    config = LoaderConfig(image_size=(16, 16), sizes=((24, (24, 32)), (36, (32, 32))), workers=2)
    source = iter(Loader(shard_folder, config, batch_size=3, rank=1, world_size=2))
    next(source)
    pids = workers_of(source)
    shapes = [tuple(next(source).images.shape[2:]) for _ in range(8)]
    assert shapes == [(16, 16)] * 3 + [(24, 32)] * 2 + [(32, 32)] * 3 and workers_of(source) == pids
    source.close()
