"""Streaming through webdataset: shards that others wrote, without an index."""

import gzip
import io
import pickle
import shutil
import tarfile

import pytest
import torch
import webdataset as wds

from fastmae import DataError, InputError
from fastmae.data.batch import LoaderConfig
from fastmae.data.loader import Loader
from tests.conftest import make_picture
from tests.test_loader import joined, take


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """Four tars of eight PNGs or JPEGs each, written by webdataset itself."""
    folder = tmp_path_factory.mktemp("foreign")
    for s in range(4):
        with wds.TarWriter(str(folder / f"part-{s}.tar")) as writer:
            for i in range(8):
                kind = "jpg" if i % 2 else "png"
                writer.write({"__key__": f"s{s}i{i}", kind: make_picture(s * 8 + i), "cls": i})
    return folder


def test_every_sample_of_a_pass_comes_once_and_passes_differ(foreign):
    batches = take(foreign, 8, batch_size=8)
    ids, epochs = joined(batches, "sample_ids"), joined(batches, "epochs")
    first, second = (ids[epochs == e].tolist() for e in (0, 1))
    assert len(set(first)) == 32 and sorted(first) == sorted(second) and first != second
    assert set(joined(batches, "labels").tolist()) == set(range(8))


def test_the_same_seed_gives_the_same_batches(foreign):
    one, two, other = (joined(take(foreign, 4, seed=s), "images") for s in (0, 0, 1))
    assert torch.equal(one, two) and not torch.equal(one, other)


def test_ranks_and_workers_share_the_shards(foreign):
    found = [take(foreign, 4, batch_size=4, rank=r, world_size=2, workers=1) for r in range(2)]
    ids = [set(joined(b, "sample_ids").tolist()) for b in found]
    assert len(ids[0]) == len(ids[1]) == 16 and not ids[0] & ids[1]


def test_more_workers_than_shards_still_load(foreign):
    batches = take(str(foreign / "part-{0..1}.tar"), 4, batch_size=4, workers=3)
    assert len(set(joined(batches, "sample_ids").tolist())) == 16


def test_gzipped_tars_are_read(foreign, tmp_path):
    with (foreign / "part-0.tar").open("rb") as source, gzip.open(tmp_path / "part-0.tar.gz", "wb") as target:
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


class Bomb:
    """Leaves a mark where it is unpickled."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return (open, (self.mark, "w"))


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
        ("pipe:cat x.tar", 1, "pipe: runs shell commands and is refused"),
        ("{folder}/none-{{0..3}}.tar", 1, r"none-0.tar: no such shard or folder"),
        ("{folder}/empty", 1, "no shards; give a folder with index.json or tars"),
        ("{folder}/part-0.tar", 2, "1 shards cannot feed 2 ranks"),
    ],
)
def test_data_that_cannot_be_streamed_is_named(data, world_size, message, foreign):
    (foreign / "empty").mkdir(exist_ok=True)
    with pytest.raises(InputError, match=message):
        Loader(data.format(folder=foreign), LoaderConfig(), batch_size=1, world_size=world_size)


def test_tars_without_images_are_an_error_not_a_hang(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "s0.txt", b"hello")
    with pytest.raises(DataError, match="no images in these shards"):
        take(tmp_path, 1)


def test_a_tar_cut_inside_a_sample_is_an_error(foreign, tmp_path):
    data = (foreign / "part-0.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(data[: len(data) // 2 + 100])
    with pytest.raises(DataError, match=r"cut.tar.*cannot be read"):
        take(tmp_path, 20, batch_size=8)
