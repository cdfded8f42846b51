"""Building shards: the same bytes for the same input, nothing lost without a word, and any webdataset reader reads them."""

import json
import os
import shutil
import tarfile
from pathlib import Path

import pytest
import webdataset as wds

from fastmae import InputError
from fastmae.images.listing import list_images
from fastmae.images.recode import Recode
from fastmae.shards.build import write_shards
from fastmae.shards.index import Index
from tests.support.pictures import make_picture
from tests.support.shards import KEEP, contents


def test_the_same_input_gives_the_same_bytes_whatever_the_workers(image_folder, tmp_path):
    for workers in (0, 2):
        write_shards(image_folder, tmp_path / str(workers), Recode(resize=32), samples_per_shard=7, workers=workers)
    assert contents(tmp_path / "0") == contents(tmp_path / "2")
    write_shards(image_folder, tmp_path / "other", Recode(resize=32), samples_per_shard=7, seed=1)
    assert contents(tmp_path / "other") != contents(tmp_path / "0")


def test_plain_webdataset_reads_our_shards(image_folder, shard_folder):
    urls = [str(p) for p in sorted(shard_folder.glob("*.tar"))]
    samples = list(wds.WebDataset(urls, shardshuffle=False))
    assert len(samples) == 37
    classes = Index.load(shard_folder).classes
    originals = {p.read_bytes(): p.parent.name for p in image_folder.rglob("*.jpg")}
    for sample in samples:  # small JPEGs are kept byte for byte, each with its class
        assert classes[int(sample["cls"])] == originals.pop(sample["jpg"])
    assert not originals


def test_every_shard_is_a_tar_that_the_standard_library_reads(shard_folder):
    index = Index.load(shard_folder)
    assert [s.samples for s in index.shards] == [10, 10, 10, 7]
    for number, shard in enumerate(index.shards):
        with tarfile.open(shard_folder / shard.name) as tar:
            images = [m for m in tar.getmembers() if m.name.endswith(".jpg")]
        rows = index.table[index.table["shard"] == number]
        assert [m.offset_data for m in images] == rows["offset"].tolist()
        assert [m.size for m in images] == rows["size"].tolist()


def test_bad_images_are_named_and_counted_and_the_rest_is_kept(image_folder, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(image_folder, source)
    (source / "ant" / "empty.jpg").touch()
    (source / "bee" / "page.jpg").write_text("<html>not found</html>")
    whole = (source / "cat" / "photo.002.jpg").read_bytes()
    (source / "cat" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    index, bad = write_shards(source, tmp_path / "out", Recode(resize=None), samples_per_shard=10)
    assert len(index) == 37 and index.build["bad"] == 3
    assert sorted(line.split(": ")[0].rpartition("/")[2] for line in bad) == ["cut.jpg", "empty.jpg", "page.jpg"]
    assert len(Index.load(tmp_path / "out")) == 37


def test_a_link_back_into_the_folder_is_not_followed_for_ever(image_folder, tmp_path):
    shutil.copytree(image_folder, tmp_path / "source")
    (tmp_path / "source" / "ant" / "again").symlink_to(tmp_path / "source")
    assert len(write_shards(tmp_path / "source", tmp_path / "out")[0]) == 37


def test_images_are_listed_in_the_order_of_their_paths(tmp_path):
    names = ["b/2.jpg", "b/10.JPG", "b.d/1.png", "a.jpg", "b/c/1.tiff", "B/1.jpg"]
    for name in [*names, ".hidden.jpg", "b/._2.jpg", "notes.txt"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"12345")
    (tmp_path / "b" / "gone.jpg").symlink_to("nowhere")
    (tmp_path / "b" / "loop").symlink_to("loop")
    sources, classes, xxh3 = list_images(tmp_path)
    assert [s.name for s in sources] == sorted([*names, "b/gone.jpg"]) and [s.number for s in sources] == list(range(7))
    assert classes == ["B", "b", "b.d"]
    assert [(s.label, s.bytes) for s in sources if s.name in ("a.jpg", "b/gone.jpg", "b/2.jpg")] == [(-1, 5), (1, 5), (1, -1)]
    assert list_images(tmp_path).xxh3 == xxh3
    assert sources[0].path.read_bytes() == b"12345"


def test_images_without_class_folders_have_no_labels(tmp_path):
    (tmp_path / "flat").mkdir()
    for i in range(3):
        make_picture(i).save(tmp_path / "flat" / f"{i}.png")
    index, _ = write_shards(tmp_path / "flat", tmp_path / "out")
    assert index.classes == () and (index.table["label"] == -1).all()
    with tarfile.open(tmp_path / "out" / index.shards[0].name) as tar:
        assert all(name.endswith(".jpg") for name in tar.getnames())


def test_progress_counts_every_image(image_folder, tmp_path):
    seen = []
    write_shards(image_folder, tmp_path, KEEP, samples_per_shard=10, workers=2, progress=lambda *counts: seen.append(counts))
    assert seen == [(i, 37) for i in range(1, 38)]


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda source, out: None, "no images; looked for"),
        (lambda source, out: source.rmdir(), "not a folder"),
        (lambda source, out: (source / "a.jpg").write_text("no"), "none of its 1 images can be read"),
        (lambda source, out: (make_picture(0).save(source / "a.jpg"), (out / "x.tar").touch()), "holds shards already"),
    ],
)
def test_input_that_cannot_become_shards_is_named(prepare, message, tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    prepare(source, out)
    before = contents(out)
    with pytest.raises(InputError, match=message):
        write_shards(source, out)
    assert contents(out) == before  # nothing is left there


def test_images_that_are_all_bad_make_no_tar(image_folder, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(image_folder, source)
    for path in sorted(source.rglob("*.jpg"))[5:]:
        path.write_bytes(b"no")
    index, bad = write_shards(source, tmp_path / "out", KEEP, samples_per_shard=2)
    assert len(index) == 5 and len(bad) == 32
    assert sorted(p.name for p in (tmp_path / "out").glob("*.tar")) == [s.name for s in index.shards]
    assert Index.load(tmp_path / "out").table.tobytes() == index.table.tobytes()


def test_names_that_are_no_text_are_listed_and_named(image_folder, tmp_path):
    shutil.copytree(image_folder, tmp_path / "source")
    odd = os.fsencode(tmp_path / "source" / "ant") + b"/caf\xe9.jpg"
    Path(os.fsdecode(odd)).write_bytes(b"no")
    index, bad = write_shards(tmp_path / "source", tmp_path / "out", KEEP)
    assert len(index) == 37 and bad[0].endswith("caf\udce9.jpg: UnidentifiedImageError: not an image of a known format")


def test_build_settings_stand_in_the_index(image_folder, tmp_path):
    write_shards(image_folder, tmp_path, Recode(resize=32, quality=80), samples_per_shard=50, seed=3)
    build = json.loads((tmp_path / "index.json").read_text())["build"]
    assert build == {"resize": 32, "quality": 80, "exif_rotate": True, "samples_per_shard": 50, "seed": 3, "bad": 0}
