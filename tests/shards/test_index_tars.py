"""Tars that others wrote: sampled as webdataset does, read back byte for byte, refused where they could mislead."""

import gzip
import io
import json
import pickle
import shutil
import tarfile

import numpy as np
import pytest
import webdataset as wds

from fastmae import DataError, InputError
from fastmae.shards.index import Index
from fastmae.shards.index_tars import index_shards
from fastmae.shards.read import ShardReader
from fastmae.shards.samples import Sample, list_samples
from tests.support.hostile import Bomb
from tests.support.pictures import make_picture
from tests.support.tars import HOSTILE, base_256, make_tar, refused, with_header


def jpeg(number: int) -> bytes:
    file = io.BytesIO()
    make_picture(number).save(file, "JPEG")
    return file.getvalue()


def write(path, members, tar_format="ustar"):
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(make_tar(members, tar_format))


def read_all(index):
    reader = ShardReader(index)
    return [reader.read(i) for i in range(len(index))]


@pytest.fixture
def plain(tmp_path):
    """Two tars of two samples each."""
    for s in range(2):
        members = [(f"s{s}i{i}.{e}", d) for i in range(2) for e, d in (("jpg", jpeg(2 * s + i)), ("cls", b"%d" % i))]
        write(tmp_path / "tars" / f"part-{s}.tar", members)
    return tmp_path / "tars"


@pytest.mark.parametrize("length", [30, 101, 256, 300, 1000])
@pytest.mark.parametrize("tar_format", ["gnu", "pax"])
def test_names_of_any_length_are_indexed_and_read_back(tar_format, length, tmp_path):
    images = [jpeg(i) for i in range(3)]
    names = [f"{'d' * (length // 2)}/{i}{'x' * (length // 2)}.jpg" for i in range(3)]
    write(tmp_path / "a.tar", zip(names, images, strict=True), tar_format)
    index = index_shards(tmp_path)
    assert read_all(index) == images and read_all(Index.load(tmp_path)) == images
    assert [s.name for s in list_samples(tmp_path / "a.tar")[0]] == names


def test_what_webdataset_writes_is_indexed_as_webdataset_reads_it(tmp_path):
    for s in range(3):
        with wds.TarWriter(str(tmp_path / f"part-{s}.tar")) as writer:
            for i in range(4):
                kind = ("jpg", "png", "jpeg", "ppm")[i]
                sample = {kind: make_picture(s * 4 + i), "cls": i, "json": {"n": i}, "seg.png": b"not the image"}
                writer.write({"__key__": f"f.{s}/s{s}i{i}", **sample})
    index = index_shards(tmp_path, classes=("a", "b", "c", "d"))
    samples = list(wds.WebDataset([str(p) for p in sorted(tmp_path.glob("*.tar"))], shardshuffle=False))
    assert read_all(index) == [next(s[k] for k in ("jpg", "jpeg", "png", "ppm") if k in s) for s in samples]
    assert index.table["label"].tolist() == [int(s["cls"]) for s in samples]
    assert Index.load(tmp_path).classes == ("a", "b", "c", "d")


def test_our_own_shards_get_the_index_they_were_built_with(shard_folder, tmp_path):
    for tar in shard_folder.glob("*.tar"):
        shutil.copy(tar, tmp_path)
    built, index = Index.load(shard_folder), index_shards(tmp_path, classes=("ant", "bee", "cat"))
    assert np.array_equal(index.table, built.table) and index.table.dtype == built.table.dtype
    assert index.shards == built.shards and index.classes == built.classes and index.fingerprint == built.fingerprint


def test_the_index_is_the_same_whatever_the_workers(plain, tmp_path):
    calls = []
    for workers in (0, 2):
        index_shards(plain, tmp_path / str(workers), workers=workers, progress=lambda *n: calls.append(n))
    for name in ("index.json", "index.npy"):
        assert (tmp_path / "0" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()
    assert calls == [(1, 2), (2, 2)] * 2


def test_an_index_in_another_folder_finds_its_tars(plain, tmp_path):
    (tmp_path / "far" / "away").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "far" / "away")  # where "..", taken literally, would lead elsewhere
    before = sorted(plain.iterdir())
    index_shards(plain, tmp_path / "link")
    index = Index.load(tmp_path / "link")
    assert [s.name for s in index.shards] == ["../../tars/part-0.tar", "../../tars/part-1.tar"]
    assert read_all(index) == [jpeg(i) for i in range(4)] and sorted(plain.iterdir()) == before


def test_samples_are_grouped_as_webdataset_does_and_those_without_images_are_counted(tmp_path):
    write(
        tmp_path / "a.tar",
        [
            ("folder", b"", {"type": tarfile.DIRTYPE}),
            ("__meta__/x.jpg", b"meta"),
            ("folder/a.b.jpg", b"an extension of two parts"),
            ("folder/a.cls", b"1"),
            ("a.JPG", b"one"),
            ("README", b"of no sample"),
            ("a.cls", b" 2\n"),
            ("a.png", b"second choice"),
            ("b.png", b"two"),
            ("b.txt", b"words"),
            ("c.jpg", b""),
            ("c.cls", b"0"),
            (".hidden.jpg", b"of no sample"),
            ("d.cls", b"-1"),
            ("d.gif", b"three"),
        ],
    )
    samples, without = list_samples(tmp_path / "a.tar")
    data = (tmp_path / "a.tar").read_bytes()
    assert [(s.name, data[s.offset : s.offset + s.size], s.label) for s in samples] == [
        ("a.JPG", b"one", 2),
        ("b.png", b"two", -1),
        ("d.gif", b"three", -1),
    ]
    assert without == 2 and isinstance(samples[0], Sample)
    assert index_shards(tmp_path).build == {"indexed": True, "without_image": 2}


def test_pickles_are_never_run_and_never_read(tmp_path):
    bomb = pickle.dumps(Bomb(tmp_path / "mark"))
    members = [(f"s.{e}", bomb) for e in ("pkl", "pth", "pyd", "pickle", "pt", "npy", "npz", "json", "ten")]
    write(tmp_path / "tars" / "a.tar", [*members, ("s.jpg", jpeg(0))])
    assert read_all(index_shards(tmp_path / "tars")) == [jpeg(0)]
    assert not (tmp_path / "mark").exists()


def octal_size_missing():
    """An image whose size is in base 256, which ShardReader cannot read."""
    return with_header(make_tar([("a.jpg", b"x" * 600)]), 0, 124, base_256(600))


BAD = {
    **{name: HOSTILE[name] for name in HOSTILE},
    "a duplicate key": (
        make_tar([("a.jpg", b"x"), ("b.jpg", b"y"), ("a.cls", b"1")]),
        "duplicate key 'a': member 'a.cls' at offset 2560 follows another sample",
    ),
    "a duplicate extension": (
        make_tar([("a.jpg", b"x"), ("a.JPG", b"y")]),
        "member 'a.JPG' at offset 1536: its sample already has a .jpg",
    ),
    "no images": (make_tar([("a.txt", b"x"), ("b.cls", b"1")]), "no images; looked for members named .jpg, .jpeg, .png"),
    "no members": (bytes(1024), "no images; looked for"),
    "a word as class": (make_tar([("a.jpg", b"x"), ("a.cls", b"cat")]), "'a.cls' at offset 1536: a class must be an integer"),
    "a fraction as class": (make_tar([("a.jpg", b"x"), ("a.cls", b"1.0")]), "from 0, or -1 for none, got b'1.0'"),
    "no text as class": (make_tar([("a.jpg", b"x"), ("a.cls", b"")]), "or -1 for none, got b''"),
    "a negative class": (make_tar([("a.jpg", b"x"), ("a.cls", b"-2")]), "got b'-2'"),
    "a class past 32 bits": (make_tar([("a.jpg", b"x"), ("a.cls", b"%d" % 2**31)]), "got b'2147483648'"),
    "a class of many digits": (make_tar([("a.jpg", b"x"), ("a.cls", b"0" * 40_000_000)]), "got b'000000000000000000"),
    "no octal size": (octal_size_missing(), "'a.jpg' at offset 512: the header before it states its size as b'\\x80"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_tar_that_cannot_be_indexed_is_named_and_no_index_is_left(name, plain):
    with refused(plain / "part-1.tar", *BAD[name]):
        index_shards(plain)
    assert not (plain / "index.json").exists()


def test_an_image_past_4_gib_is_refused(tmp_path):
    size = 2**32
    head = with_header(make_tar([("a.jpg", b"")])[:512], 0, 124, b"%011o\0" % size)
    with (tmp_path / "a.tar").open("wb") as file:  # of holes: it takes no room
        file.write(head)
        file.truncate(512 + size + 1024)
    with pytest.raises(DataError, match=r"a.tar: image 'a.jpg' at offset 512 has 4294967296 bytes, the limit is 4294967295"):
        list_samples(tmp_path / "a.tar")


def finish_half(folder):
    (folder / ".unfinished").touch()


def leave_only_compressed(folder):
    for path in folder.glob("*.tar"):
        path.with_suffix(".tar.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()


def double(folder):
    shutil.copy(folder / "part-0.tar", folder / "part-9.tar")


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (finish_half, {}, "tars: the build of these shards was not finished"),
        (leave_only_compressed, {}, r"tars: no \*.tar in it; compressed ones cannot be read at random: gunzip them, or stream"),
        (shutil.rmtree, {}, "tars: not a folder; give a folder of tars"),
        (lambda f: [p.unlink() for p in f.iterdir()], {}, r"tars: no \*.tar in it; give a folder of tars"),
        (double, {}, r"part-9.tar: the same bytes as .*part-0.tar, its samples would come twice; remove one"),
        (lambda f: None, {"classes": ("a",)}, r"part-0.tar: holds class number 1, 1 class names were given; name all"),
        (lambda f: (f / "part-2.tar").mkdir(), {}, "part-2.tar: not a file; give a tar"),
        (lambda f: (f / "part-2.tar").mkdir(), {"workers": 2}, "part-2.tar: not a file; give a tar"),
    ],
)
def test_folders_that_cannot_be_indexed_are_named(change, options, message, plain):
    change(plain)
    with pytest.raises(InputError, match=message):
        index_shards(plain, **options)


def test_an_index_from_building_is_kept_and_one_that_no_longer_serves_is_replaced(shard_folder, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(shard_folder, folder)
    with pytest.raises(InputError, match="copy: has an index already, from building its shards"):
        index_shards(folder)
    for damage in (b"{", b'{"format": 1}'):
        (folder / "index.json").write_bytes(damage)
        assert len(index_shards(folder)) == 37
    assert index_shards(folder, classes=("ant", "bee", "cat")).classes  # made by indexing, so replaced
    assert json.loads((folder / "index.json").read_text())["build"]["indexed"]


def test_hidden_files_beside_the_tars_are_left_alone(plain):
    (plain / "._part-0.tar").write_bytes(b"what macOS leaves behind")
    assert len(index_shards(plain)) == 4
