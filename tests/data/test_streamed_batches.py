"""Streaming through webdataset: shards that others wrote, without an index."""

import contextlib
import gzip
import http.server
import io
import pickle
import shutil
import sys
import tarfile
import threading
from functools import partial
from typing import ClassVar

import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

from fastmae import DataError, InputError
from fastmae.data.batch import LoaderConfig
from fastmae.data.loader import Loader
from tests.support.batches import joined, take
from tests.support.hostile import Bomb
from tests.support.pictures import make_picture


def test_every_sample_of_a_pass_comes_once_and_passes_differ(tar_folder):
    batches = take(tar_folder, 8, batch_size=8)
    ids, epochs = joined(batches, "sample_ids"), joined(batches, "epochs")
    first, second = (ids[epochs == e].tolist() for e in (0, 1))
    assert len(set(first)) == 32 and sorted(first) == sorted(second) and first != second
    assert set(joined(batches, "labels").tolist()) == set(range(8))


def test_the_same_seed_gives_the_same_batches(tar_folder):
    one, two, other = (joined(take(tar_folder, 4, seed=s), "images") for s in (0, 0, 1))
    assert torch.equal(one, two) and not torch.equal(one, other)


def test_ranks_and_workers_share_the_shards(tar_folder):
    found = [take(tar_folder, 4, batch_size=4, rank=r, world_size=2, workers=1) for r in range(2)]
    ids = [set(joined(b, "sample_ids").tolist()) for b in found]
    assert len(ids[0]) == len(ids[1]) == 16 and not ids[0] & ids[1]


def test_more_workers_than_shards_still_load(tar_folder):
    batches = take(str(tar_folder / "part-{0..1}.tar"), 4, batch_size=4, workers=3)
    assert len(set(joined(batches, "sample_ids").tolist())) == 16


def test_gzipped_tars_are_read(tar_folder, tmp_path):
    with (tar_folder / "part-0.tar").open("rb") as source, gzip.open(tmp_path / "part-0.tar.gz", "wb") as target:
        shutil.copyfileobj(source, target)
    assert len(set(joined(take(tmp_path, 1, batch_size=8), "sample_ids").tolist())) == 8


def test_our_own_shards_stream_too(shard_folder, tmp_path):
    for tar in shard_folder.glob("*.tar"):
        shutil.copy(tar, tmp_path)
    assert len(set(joined(take(tmp_path, 1, batch_size=37), "sample_ids").tolist())) == 37


def add(tar, name, data):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def test_pickles_are_never_run_and_bad_images_are_named(tmp_path):
    picture = io.BytesIO()
    make_picture(0).save(picture, "JPEG")
    mark = tmp_path / "mark"
    folder = tmp_path / "shards"
    folder.mkdir()
    with tarfile.open(folder / "a.tar", "w") as tar:
        for i in range(6):
            add(tar, f"s{i}.jpg", picture.getvalue())
            add(tar, f"s{i}.pkl", pickle.dumps(Bomb(mark)))
            add(tar, f"s{i}.pyd", pickle.dumps(Bomb(mark)))
        add(tar, "bad.jpg", b"not an image")
    batches = take(folder, 2, batch_size=6)
    assert not mark.exists()
    assert any("bad: " in line for b in batches for line in b.replaced)


@pytest.mark.parametrize(
    ("data", "world_size", "message"),
    [
        ("pipe:cat x.tar", 1, "pipe: runs shell commands and is refused; --allow-pipe allows it"),
        ("ftp://host/a.tar", 1, "ftp://host/a.tar: a URL must be of http, https, s3, gs or file, got 'ftp'"),
        ("{folder}/none-{{0..3}}.tar", 1, r"none-0.tar: no such shard or folder"),
        ("{own}/empty", 1, "no shards; give a folder with index.json or tars"),
        ("{folder}/part-0.tar", 2, "1 shards for 2 ranks"),
    ],
)
def test_data_that_cannot_be_streamed_is_named(data, world_size, message, tar_folder, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=message):
        Loader(data.format(folder=tar_folder, own=tmp_path), LoaderConfig(), batch_size=1, world_size=world_size)


def test_tars_without_images_are_an_error_not_a_hang(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "s0.txt", b"hello")
    with pytest.raises(DataError, match="no images in these shards"):
        take(tmp_path, 1)


def test_a_tar_cut_inside_a_sample_is_an_error(tar_folder, tmp_path):
    data = (tar_folder / "part-0.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(data[: len(data) // 2 + 100])
    with pytest.raises(DataError, match=r"cut.tar.*cannot be read"):
        take(tmp_path, 20, batch_size=8)


@contextlib.contextmanager
def served(folder):
    """``folder`` over HTTP on this machine; the address."""
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.RequestHandlerClass.log_message = lambda *_: None
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_are_read_over_http(tar_folder, workers):
    with served(tar_folder) as address:
        found = take(f"{address}/part-{{0..3}}.tar", 4, batch_size=8, workers=workers)
    local = take(str(tar_folder / "part-{0..3}.tar"), 4, batch_size=8, workers=workers)
    assert sorted(joined(found, "sample_ids").tolist()) == sorted(joined(local, "sample_ids").tolist())
    assert len(set(joined(found, "sample_ids").tolist())) == 32


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_buckets_are_read_through_fsspec(tar_folder, scheme, monkeypatch):
    """A bucket's client is fsspec's affair; that its files reach the loader is ours. A file system in memory stands for it."""

    class Bucket(MemoryFileSystem):
        protocol = scheme
        store: ClassVar[dict] = {}
        pseudo_dirs: ClassVar[list] = [""]

    monkeypatch.setitem(sys.modules["fsspec.registry"]._registry, scheme, Bucket)
    for part in tar_folder.glob("*.tar"):
        Bucket().pipe_file(f"{scheme}://bucket/{part.name}", part.read_bytes())
    found = take(f"{scheme}://bucket/part-{{0..3}}.tar", 4, batch_size=8)
    assert len(set(joined(found, "sample_ids").tolist())) == 32


def test_a_missing_client_of_a_bucket_is_named_with_its_install_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(InputError, match=r"gs://b/a.tar: cannot be read .*: pip install 'fsspec\[gs\]'"):
        Loader("gs://b/a.tar", LoaderConfig(), batch_size=1)


def test_a_server_that_has_no_such_shard_is_one_clear_error(tar_folder):
    with served(tar_folder) as address, pytest.raises(DataError, match=r"none.tar.*cannot be read"):
        take(f"{address}/none.tar", 1)


def test_pipes_run_only_if_asked_for(tar_folder):
    command = f"pipe:cat {tar_folder}/part-0.tar"
    assert len(set(joined(take(command, 1, batch_size=8, allow_pipe=True), "sample_ids").tolist())) == 8


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
def test_damage_that_webdataset_passes_over_is_an_error(tar_folder, tmp_path, suffix):
    """A header damaged after the first member silently ends webdataset's reading; so does a truncation between members."""
    data = bytearray((tar_folder / "part-0.tar").read_bytes())
    with tarfile.open(tar_folder / "part-0.tar") as tar:
        third = tar.getmembers()[4].offset
    pack = gzip.compress if suffix == ".tar.gz" else bytes
    data[third + 100 : third + 140] = bytes(40)
    (tmp_path / f"damaged{suffix}").write_bytes(pack(bytes(data)))
    with pytest.raises(
        DataError, match=rf"damaged{suffix}: damaged before offset \d+, where reading stopped although data follow"
    ):
        take(str(tmp_path / f"damaged{suffix}"), 9, batch_size=8)
    (tmp_path / f"cut{suffix}").write_bytes(pack((tar_folder / "part-0.tar").read_bytes()[:third]))
    with pytest.raises(DataError, match=rf"cut{suffix}: truncated at offset {third}: the end marker of a tar is missing"):
        take(str(tmp_path / f"cut{suffix}"), 9, batch_size=8)


def test_views_of_a_streamed_sample_stand_side_by_side(tar_folder):
    for batch in take(tar_folder, 4, batch_size=8, views=2):
        assert torch.equal(batch.sample_ids[::2], batch.sample_ids[1::2])
        assert not (batch.images[::2] == batch.images[1::2]).flatten(1).all(1).any()


def test_image_sizes_follow_their_schedule_in_a_stream(tar_folder):
    batches = take(tar_folder, 6, batch_size=4, workers=2, sizes=((8, (24, 24)), (16, (32, 40))))
    assert [tuple(b.images.shape[2:]) for b in batches] == [(16, 16)] * 2 + [(24, 24)] * 2 + [(32, 40)] * 2


@pytest.mark.parametrize(
    ("fields", "flags"),
    [
        ({"crop": "device"}, "--crop device"),
        ({"shuffle_window": 2}, "--shuffle-window"),
    ],
)
def test_what_a_stream_cannot_do_is_said(tar_folder, fields, flags):
    with pytest.raises(InputError, match=f"has no index, and a stream is decoded .*: remove {flags}, or make an index"):
        Loader(tar_folder, LoaderConfig(**fields), batch_size=1)
