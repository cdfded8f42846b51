"""The index and indexed reads: every byte found, every disagreement named."""

import json
import pickle
import shutil

import numpy as np
import pytest

from fastmae import DataError
from fastmae.data.index import Index
from fastmae.data.read import ShardReader


@pytest.fixture
def copy(shard_folder, tmp_path):
    shutil.copytree(shard_folder, tmp_path / "copy")
    return tmp_path / "copy"


def test_every_image_is_read_back_byte_for_byte(image_folder, shard_folder):
    reader = pickle.loads(pickle.dumps(ShardReader(Index.load(shard_folder))))  # as a worker gets it
    originals = {p.read_bytes() for p in image_folder.rglob("*.jpg")}
    assert {reader.read(i) for i in range(37)} == originals


def test_more_shards_than_open_files_are_read(shard_folder):
    reader = ShardReader(Index.load(shard_folder))
    reader._most = 1
    data = [reader.read(i) for i in (0, 36, 12, 0)]
    assert data[0] == data[3] and len(reader._files) == 1


def test_a_sample_is_named_by_shard_and_key(shard_folder):
    name = ShardReader(Index.load(shard_folder)).name(11)
    assert "shard-000001.tar: " in name and name.endswith(".jpg") and "photo_" in name


def test_fingerprint_changes_with_the_data_and_with_nothing_else(shard_folder, copy):
    assert Index.load(copy).fingerprint == Index.load(shard_folder).fingerprint
    index = Index.load(copy)
    table = index.table.copy()
    table["label"][3] += 1
    Index(folder=copy, shards=index.shards, table=table, classes=index.classes, build=index.build).save()
    assert Index.load(copy).fingerprint != Index.load(shard_folder).fingerprint


def change_json(folder, **fields):
    path = folder / "index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def lie(folder, field, by):
    """Let the index state ``field`` of every sample too high, consistently, and read one."""
    index = Index.load(folder)
    table = index.table.copy()
    table[field] += by
    Index(folder=folder, shards=index.shards, table=table, classes=(), build={}).save()
    ShardReader(Index.load(folder)).read(0)


def append_byte(path):
    path.write_bytes(path.read_bytes() + b"\0")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "shard-000002.tar").unlink(), r"shard-000002.tar: missing; the index lists 4 shards"),
        (lambda f: append_byte(f / "shard-000001.tar"), r"shard-000001.tar: \d+ bytes, the index says \d+"),
        (lambda f: (f / "index.json").write_text("{"), "index.json: damaged, not JSON"),
        (lambda f: (f / "index.json").write_text("[]"), "index.json: damaged, not a JSON object"),
        (lambda f: (f / "index.json").unlink(), "index.json: cannot be read"),
        (lambda f: change_json(f, format=99), "format 99 is newer"),
        (lambda f: change_json(f, shards=[{"name": "x"}]), "index.json: damaged"),
        (lambda f: (f / "index.npy").unlink(), "index.npy: cannot be read"),
        (lambda f: (f / "index.npy").write_bytes(b"\x93NUMPY garbage"), "index.npy: cannot be read"),
        (lambda f: np.save(f / "index.npy", np.zeros(3)), "index.npy: does not match index.json"),
        (lambda f: np.save(f / "index.npy", np.array([object()]), allow_pickle=True), "index.npy: cannot be read"),
        (lambda f: lie(f, "offset", 512), r"shard-000000.tar: the index does not match the tar at offset \d+"),
        (lambda f: lie(f, "size", 1), r"shard-000000.tar: the index does not match the tar at offset \d+"),
    ],
)
def test_damage_is_named_with_its_path(damage, message, copy):
    with pytest.raises(DataError, match=message):
        damage(copy)
        Index.load(copy)
