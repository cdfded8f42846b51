"""Images that are damaged, disguised or dishonest, through tar, index and loader: used rightly, or named and replaced."""

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastmae.data.batch import LoaderConfig
from fastmae.data.loader import Loader
from fastmae.images.decode import DecodeError, decode
from tests.support.hostile import GOOD, REPLACED, SCAN, dataset, encode, with_exif
from tests.support.pictures import make_picture


def animated(kind):
    return encode(make_picture(1), kind, save_all=True, append_images=[make_picture(2), make_picture(3)], duration=50)


USED = {  # an image that is unusual, and no worse; with the pixels it must give
    "a PNG named .jpg": (encode(make_picture(1), "PNG"), make_picture(1)),
    "a WebP named .jpg": (encode(make_picture(1), "WEBP", lossless=True), make_picture(1)),
    "a GIF named .jpg": (encode(make_picture(1).quantize(8), "GIF"), make_picture(1).quantize(8)),
    "a BMP named .jpg": (encode(make_picture(1), "BMP"), make_picture(1)),
    "an animated GIF": (animated("GIF"), None),
    "an animated WebP": (animated("WEBP"), None),
    "a grayscale JPEG": (encode(make_picture(1).convert("L")), None),
    "a CMYK JPEG": (encode(make_picture(1).convert("CMYK")), None),
    "a 16-bit PNG": (encode(Image.fromarray(np.full((8, 8), 0x4000, np.uint16)), "PNG"), Image.new("RGB", (8, 8), (64,) * 3)),
    "a palette PNG": (encode(make_picture(1).quantize(16), "PNG"), make_picture(1).quantize(16)),
    "a PNG with alpha": (encode(Image.new("RGBA", (8, 8), (10, 200, 30, 0)), "PNG"), Image.new("RGB", (8, 8), (10, 200, 30))),
    "a JPEG turned by EXIF": (with_exif(), None),
    "a progressive JPEG": (encode(make_picture(1), progressive=True), None),
    "a JPEG of one pixel": (encode(Image.new("RGB", (1, 1), (9, 9, 9))), None),
    "a JPEG of 1 x 3000": (encode(make_picture(0, (3000, 1))), None),
}  # fmt: skip


@pytest.mark.parametrize("crop", ["cpu", "device"])
@pytest.mark.parametrize("name", USED)
def test_unusual_images_are_used(name, crop, tmp_path):
    data, expected = USED[name]
    (batch,) = first(dataset(tmp_path, data), crop)
    assert batch.replaced == () and sorted(batch.sample_ids.tolist()) == list(range(11))
    if expected is not None:
        assert np.array_equal(decode(data), np.asarray(expected.convert("RGB")))


@pytest.mark.parametrize("name", REPLACED)
def test_bad_images_are_named_and_replaced(name, tmp_path):
    data, reason = REPLACED[name]
    (batch,) = first(dataset(tmp_path, data), "cpu")
    (line,) = batch.replaced
    assert "a.tar: odd.jpg: " in line and reason in line
    ids = batch.sample_ids.tolist()
    assert batch.images.shape == (11, 3, 16, 16) and 10 not in ids and len(set(ids)) == 10


def first(folder, crop):
    source = iter(Loader(folder, LoaderConfig(image_size=(16, 16), workers=0, crop=crop), batch_size=11))
    try:
        return [next(source)]
    finally:
        source.close()


def peak_memory() -> int:
    """The most memory that this process has held, in bytes; writing 5 to clear_refs resets it."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024


@pytest.mark.timing
@pytest.mark.parametrize("name", [n for n in REPLACED if "header of" in n])
def test_dishonest_headers_cost_neither_time_nor_memory(name):
    data, _ = REPLACED[name]
    with pytest.raises(DecodeError):
        decode(data)  # imports done
    Path("/proc/self/clear_refs").write_text("5")
    before, seconds = peak_memory(), []
    for _ in range(5):
        began = time.perf_counter()
        with pytest.raises(DecodeError):
            decode(data)
        seconds.append(time.perf_counter() - began)
    assert min(seconds) < 0.005 and peak_memory() - before < 10 << 20


@pytest.mark.parametrize("offset", range(0, 300, 37))
def test_one_flipped_bit_after_indexing_is_always_noticed(offset, tmp_path):
    """Decoders take most flipped bits for other pixels; the checksum does not."""
    folder = dataset(tmp_path, GOOD)
    data = bytearray((folder / "a.tar").read_bytes())
    data[data.index(GOOD) + SCAN + offset] ^= 1
    (folder / "a.tar").write_bytes(data)
    (batch,) = first(folder, "cpu")
    assert len(batch.replaced) == 1 and "do not match their checksum in the index" in batch.replaced[0]
    assert not torch.equal(batch.sample_ids.sort()[0], torch.arange(11))
