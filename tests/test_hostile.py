"""Images that are damaged, disguised or dishonest, through tar, index and loader: used rightly, or named and replaced."""

import io
import struct
import tarfile
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastmae.data.batch import LoaderConfig
from fastmae.data.decode import DecodeError, decode
from fastmae.data.foreign import index_shards
from fastmae.data.loader import Loader
from tests.conftest import make_picture


def encode(image, kind="JPEG", **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


GOOD = encode(make_picture(1), quality=90)
FRAME = GOOD.index(b"\xff\xc0") + 5  # height and width stand here
SCAN = GOOD.index(b"\xff\xda") + 20


def claiming(height, width):
    return GOOD[:FRAME] + struct.pack(">HH", height, width) + GOOD[FRAME + 4 :]


def with_exif():
    exif = Image.Exif()
    exif[0x0112] = 6
    return encode(make_picture(1), exif=exif)


def animated(kind):
    return encode(make_picture(1), kind, save_all=True, append_images=[make_picture(2), make_picture(3)], duration=50)


def png_of(width=48, height=48):
    """A PNG whose header claims so many pixels, and that has none."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IEND", b"")


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
REPLACED = {  # what cannot be used, and a word of the reason
    "a JPEG cut in half": (GOOD[: len(GOOD) // 2], "cannot be decoded"),
    "a JPEG cut in its header": (GOOD[:100], "cannot be decoded"),
    "a JPEG without its last bytes": (GOOD[:-20], "cannot be decoded"),
    "a JPEG with a damaged scan": (GOOD[:SCAN] + bytes(300) + GOOD[SCAN + 300 :], "cannot be decoded"),
    "a JPEG with a flipped marker": (GOOD[:FRAME - 4] + b"\x01" + GOOD[FRAME - 3 :], "cannot be decoded"),
    "a header of 65500 x 65500": (claiming(65500, 65500), "claims 65500 x 65500 pixels"),
    "a header of 12000 x 12000": (claiming(12000, 12000), "claims 12000 x 12000 pixels"),
    "a header of no height": (claiming(0, 64), "cannot be decoded"),
    "a PNG header of 60000 x 60000": (png_of(width=60000, height=60000), "Image size (3600000000 pixels)"),
    "a PNG without pixels": (png_of(), "cannot be decoded"),
    "a page of HTML": (b"<!doctype html><html><body>404</body></html>", "cannot be decoded"),
    "an SVG": (b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>', "cannot be decoded"),
    "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) (w) file\nshowpage\n", "cannot be decoded"),
    "zeros": (bytes(4000), "cannot be decoded"),
    "noise": (np.random.default_rng(0).bytes(4000), "cannot be decoded"),
    "two bytes": (b"\xff\xd8", "cannot be decoded"),
    "a pickle": (b"\x80\x04cos\nsystem\n(S'true'\ntR.", "cannot be decoded"),
    "a WebP cut in half": (encode(make_picture(1), "WEBP")[:300], "cannot be decoded"),
}  # fmt: skip


def dataset(folder: Path, data: bytes) -> Path:
    """Ten good JPEGs and the given bytes as the eleventh, in an indexed tar."""
    with tarfile.open(folder / "a.tar", "w") as tar:
        for i in range(10):
            add(tar, f"{i}.jpg", encode(make_picture(i)))
        add(tar, "odd.jpg", data)
    index_shards(folder)
    return folder


def add(tar, name, data):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


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
    """The most memory that this process has held, in bytes; writing 5 to clear_refs starts it anew."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024


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
    assert len(batch.replaced) == 1 and "are not those that were indexed (checksum)" in batch.replaced[0]
    assert not torch.equal(batch.sample_ids.sort()[0], torch.arange(11))
