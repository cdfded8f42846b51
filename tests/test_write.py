"""Building shards: the same bytes for the same input, nothing lost without a word, and any webdataset reader reads them."""

import io
import json
import shutil
import tarfile

import numpy as np
import pytest
import webdataset as wds
from PIL import Image

from fastmae import InputError
from fastmae.data.decode import DecodeError, decode
from fastmae.data.index import Index
from fastmae.data.recode import Recode, recode
from fastmae.data.write import write_shards
from tests.conftest import make_picture


def contents(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


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


def test_images_are_resized_by_the_shorter_side_and_never_enlarged(tmp_path):
    make_picture(0, (100, 150)).save(tmp_path / "large.jpg")
    make_picture(1, (30, 50)).save(tmp_path / "small.jpg")
    with Image.open(io.BytesIO(recode(tmp_path / "large.jpg", Recode(resize=64)))) as image:
        assert image.size == (96, 64)
    assert recode(tmp_path / "small.jpg", Recode(resize=64)) == (tmp_path / "small.jpg").read_bytes()


def test_resizing_is_antialiased(tmp_path):
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    Image.fromarray(stripes).save(tmp_path / "stripes.png")
    with Image.open(io.BytesIO(recode(tmp_path / "stripes.png", Recode(resize=16)))) as image:
        assert abs(np.asarray(image, np.int64) - 128).max() < 12  # without the filter: all black or all white


@pytest.mark.parametrize(
    ("name", "image", "expected"),
    [
        ("alpha.png", Image.new("RGBA", (20, 20), (10, 200, 30, 128)), (10, 200, 30)),
        ("palette.png", Image.new("RGB", (20, 20), (10, 200, 30)).quantize(4), (10, 200, 30)),
        ("cmyk.jpg", Image.new("CMYK", (20, 20), (255, 0, 0, 0)), (0, 255, 255)),
        ("deep.png", Image.fromarray(np.full((20, 20), 0x8000, np.uint16)), (128, 128, 128)),
        ("moving.gif", Image.new("P", (20, 20), 0), (0, 0, 0)),
    ],
)
def test_every_kind_of_image_becomes_an_rgb_jpeg(name, image, expected, tmp_path):
    image.save(tmp_path / name)
    with Image.open(io.BytesIO(recode(tmp_path / name, Recode(resize=None)))) as stored:
        assert (stored.format, stored.mode) == ("JPEG", "RGB")
        assert abs(np.asarray(stored, np.int64) - np.array(expected)).max() <= 4


def test_exif_orientation_is_applied_or_ignored(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    make_picture(0, (20, 40)).save(tmp_path / "turned.jpg", exif=exif)
    with Image.open(io.BytesIO(recode(tmp_path / "turned.jpg", Recode(resize=None)))) as image:
        assert image.size == (20, 40)
    kept = recode(tmp_path / "turned.jpg", Recode(resize=None, exif_rotate=False))
    assert kept == (tmp_path / "turned.jpg").read_bytes()


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


def test_a_jpeg_that_only_pillow_can_read_is_encoded_anew(tmp_path):
    make_picture(0).save(tmp_path / "good.jpg")
    data = (tmp_path / "good.jpg").read_bytes()
    (tmp_path / "odd.jpg").write_bytes(data[:-2] + bytes(100) + data[-2:])
    with pytest.raises(DecodeError):
        decode((tmp_path / "odd.jpg").read_bytes())
    assert decode(recode(tmp_path / "odd.jpg", Recode(resize=None))).shape == (48, 64, 3)


def test_a_link_back_into_the_folder_is_not_followed_for_ever(image_folder, tmp_path):
    shutil.copytree(image_folder, tmp_path / "source")
    (tmp_path / "source" / "ant" / "again").symlink_to(tmp_path / "source")
    assert len(write_shards(tmp_path / "source", tmp_path / "out")[0]) == 37


def test_images_without_class_folders_have_no_labels(tmp_path):
    (tmp_path / "flat").mkdir()
    for i in range(3):
        make_picture(i).save(tmp_path / "flat" / f"{i}.png")
    index, _ = write_shards(tmp_path / "flat", tmp_path / "out")
    assert index.classes == () and (index.table["label"] == -1).all()
    with tarfile.open(tmp_path / "out" / index.shards[0].name) as tar:
        assert all(name.endswith(".jpg") for name in tar.getnames())


def test_an_interrupted_build_leaves_no_index_and_no_half_shard(image_folder, tmp_path):
    def interrupt(done, _):
        if done == 15:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(image_folder, tmp_path, Recode(resize=None), samples_per_shard=10, progress=interrupt)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".unfinished", "shard-000000.tar"]
    assert len(list(wds.WebDataset(str(tmp_path / "shard-000000.tar"), shardshuffle=False))) == 10


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
    with pytest.raises(InputError, match=message):
        write_shards(source, out)
    assert not (out / "index.json").exists()


def test_build_settings_stand_in_the_index(image_folder, tmp_path):
    write_shards(image_folder, tmp_path, Recode(resize=32, quality=80), samples_per_shard=50, seed=3)
    build = json.loads((tmp_path / "index.json").read_text())["build"]
    assert build == {"resize": 32, "quality": 80, "exif_rotate": True, "samples_per_shard": 50, "seed": 3, "bad": 0}
