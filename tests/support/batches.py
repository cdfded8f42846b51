"""Batches of a Loader over the shards of 37 images, compared field by field, and samples damaged inside their tars."""

import torch

from fastmae.data.batch import Batch, LoaderConfig
from fastmae.data.loader import Loader
from fastmae.shards.index import Index

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


def damage_samples(folder, count):
    """Damage the first ``count`` samples."""
    damage(folder, range(count))


def damage(folder, samples):
    """Overwrite the JPEGs of ``samples`` inside their tars, lengths unchanged."""
    index = Index.load(folder)
    for row in index.table[samples]:
        with (folder / index.shards[row["shard"]].name).open("r+b") as file:
            file.seek(int(row["offset"]) + 2)
            file.write(bytes(int(row["size"]) - 2))
