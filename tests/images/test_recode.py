"""Any image file becomes a JPEG that training can decode, looking as it should, or is refused with the reason."""

import io
import os
import resource
import struct
import time
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from fastmae.images.decode import DecodeError, decode
from fastmae.images.recode import Recode, recode
from tests.support.pictures import make_picture

KEEP = Recode(resize=None)
GREEN = (10, 200, 30)


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(size, depth, colour, rows, extra=b""):
    """A PNG made by hand, as Pillow cannot write it."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def tiff16(pixel, count):
    """A 16-bit RGB TIFF of (count, 1) pixels."""
    tags = [(256, count), (257, 1), (259, 1), (262, 2), (273, 134), (277, 3), (278, 1), (279, 6 * count)]
    entries = [struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags]
    entries.insert(2, struct.pack("<HHII", 258, 3, 3, 128))  # bits of each sample
    directory = struct.pack("<H", len(entries)) + b"".join(entries)
    head = b"II*\0" + struct.pack("<I", 8) + directory + bytes(4)
    return head.ljust(128, b"\0") + struct.pack("<HHH", 16, 16, 16) + struct.pack("<HHH", *pixel) * count


def stored(path, settings=KEEP):
    with Image.open(io.BytesIO(recode(path, settings))) as image:
        image.load()
        return image


def test_images_are_resized_by_the_shorter_side_and_never_enlarged(tmp_path):
    make_picture(0, (100, 150)).save(tmp_path / "large.jpg")
    make_picture(1, (30, 50)).save(tmp_path / "small.jpg")
    assert stored(tmp_path / "large.jpg", Recode(resize=64)).size == (96, 64)
    assert recode(tmp_path / "small.jpg", Recode(resize=64)) == (tmp_path / "small.jpg").read_bytes()
    make_picture(1, (30, 50)).save(tmp_path / "small.png")
    assert stored(tmp_path / "small.png", Recode(resize=64)).size == (50, 30)


def test_resizing_is_antialiased(tmp_path):
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    Image.fromarray(stripes).save(tmp_path / "stripes.png")
    pixels = np.asarray(stored(tmp_path / "stripes.png", Recode(resize=16)), np.int64)
    assert abs(pixels - 128).max() < 12  # without the filter: all black or all white


def save(image, **options):
    return lambda path: image.save(path, **options)


FRAMES = [Image.new("RGB", (20, 20), colour) for colour in (GREEN, "red", "blue")]
MOVING = {"save_all": True, "append_images": FRAMES[1:]}
HIGH = struct.pack(">HHH", 10 << 8 | 7, 200 << 8 | 7, 30 << 8 | 7)


@pytest.mark.parametrize(
    ("name", "write", "expected"),
    [
        ("alpha.png", save(Image.new("RGBA", (20, 20), (*GREEN, 0))), GREEN),
        ("alpha.webp", save(Image.new("RGBA", (20, 20), (*GREEN, 9)), lossless=True, exact=True), GREEN),
        ("grey-alpha.png", save(Image.new("LA", (20, 20), (90, 0))), (90, 90, 90)),
        ("grey.png", save(Image.new("L", (20, 20), 90)), (90, 90, 90)),
        ("bits.png", save(Image.new("1", (20, 20), 1)), (255, 255, 255)),
        ("palette.png", save(FRAMES[0].quantize(4)), GREEN),
        ("see-through.png", save(FRAMES[0].quantize(4), transparency=bytes(4)), GREEN),
        ("see-through.gif", save(FRAMES[0].quantize(4), transparency=0), GREEN),
        ("cmyk.jpg", save(Image.new("CMYK", (20, 20), (255, 0, 0, 0))), (0, 255, 255)),
        ("cmyk.tif", save(Image.new("CMYK", (20, 20), (255, 0, 0, 0))), (0, 255, 255)),
        ("deep.png", save(Image.fromarray(np.full((20, 20), 0x8000, np.uint16))), (128, 128, 128)),
        ("deep.tif", save(Image.fromarray(np.full((20, 20), 0x8000, np.uint16))), (128, 128, 128)),
        ("deep-rgb.png", lambda p: p.write_bytes(png((20, 20), 16, 2, (b"\0" + HIGH * 20) * 20)), GREEN),
        ("deep-rgba.png", lambda p: p.write_bytes(png((20, 20), 16, 6, (b"\0" + (HIGH + b"\1\1") * 20) * 20)), GREEN),
        ("deep-rgb.tif", lambda p: p.write_bytes(tiff16([v << 8 | 7 for v in GREEN], 20)), GREEN),
        ("moving.gif", save(FRAMES[0], **MOVING, comment=b"x" * 70_000), GREEN),  # longer than a JPEG's may be
        ("moving.webp", save(FRAMES[0], **MOVING, lossless=True), GREEN),
        ("moving.png", save(FRAMES[0], **MOVING), GREEN),
        ("pages.tif", save(FRAMES[0], **MOVING), GREEN),
    ],
)
def test_every_kind_of_image_becomes_an_rgb_jpeg(name, write, expected, tmp_path):
    write(tmp_path / name)
    image = stored(tmp_path / name)
    assert (image.format, image.mode, image.width) == ("JPEG", "RGB", 20)
    assert abs(np.asarray(image, np.int64) - np.array(expected)).max() <= 4


def test_a_multi_picture_jpeg_gives_its_first(tmp_path):
    FRAMES[0].save(tmp_path / "two.jpg", format="MPO", **MOVING)
    kept = recode(tmp_path / "two.jpg", KEEP)
    assert kept == (tmp_path / "two.jpg").read_bytes()
    assert abs(decode(kept).astype(np.int64) - GREEN).max() <= 4
    assert stored(tmp_path / "two.jpg", Recode(resize=10)).size == (10, 10)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation, suffix, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = make_picture(3, (24, 40))
    options = {"jpg": {"quality": 95}, "webp": {"lossless": True}}.get(suffix, {})
    picture.save(tmp_path / f"turned.{suffix}", exif=exif, **options)
    picture.getexif()[0x0112] = orientation
    expected = np.asarray(ImageOps.exif_transpose(picture), np.int64)
    found = np.asarray(stored(tmp_path / f"turned.{suffix}", Recode(resize=None, quality=95)), np.int64)
    assert found.shape == expected.shape and abs(found - expected).mean() < 4
    assert stored(tmp_path / f"turned.{suffix}").getexif().get(0x0112, 1) == 1  # nobody turns it again


def test_exif_orientation_is_ignored_when_asked(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    make_picture(0, (20, 40)).save(tmp_path / "turned.jpg", exif=exif)
    kept = recode(tmp_path / "turned.jpg", Recode(resize=None, exif_rotate=False))
    assert kept == (tmp_path / "turned.jpg").read_bytes()


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_an_image_with_damaged_exif_is_kept(suffix, tmp_path):
    upright = struct.pack(">HHIHH", 0x0112, 3, 1, 6, 0)
    text = struct.pack(">HHI4s", 0x011A, 2, 4, b"abc\0")  # where a fraction should be
    header = b"MM\0*\0\0\0\x08"
    blocks = {
        b"nonsense": (40, 20),
        header: (40, 20),
        header + struct.pack(">H", 2) + upright + text + bytes(4): (20, 40),
        header + struct.pack(">H", 900) + upright: (20, 40),  # states 900 entries
    }
    for block, size in blocks.items():
        make_picture(0, (20, 40)).save(tmp_path / f"odd.{suffix}", exif=b"Exif\0\0" + block)
        assert decode(recode(tmp_path / f"odd.{suffix}", KEEP)).shape == (*size[::-1], 3)


def test_a_jpeg_that_only_pillow_can_read_is_encoded_again(tmp_path):
    make_picture(0).save(tmp_path / "good.jpg")
    data = (tmp_path / "good.jpg").read_bytes()
    (tmp_path / "odd.jpg").write_bytes(data[:-2] + bytes(100) + data[-2:])
    with pytest.raises(DecodeError):
        decode((tmp_path / "odd.jpg").read_bytes())
    assert decode(recode(tmp_path / "odd.jpg", KEEP)).shape == (48, 64, 3)


def huge(suffix):
    """A file of a few hundred bytes whose header states 65500 x 65500 pixels."""
    out = io.BytesIO()
    make_picture(0).save(out, {"jpg": "JPEG", "gif": "GIF"}.get(suffix))
    data = bytearray(out.getvalue())
    if suffix == "gif":
        data[6:10] = struct.pack("<HH", 65500, 65500)
    else:
        at = data.find(b"\xff\xc0") + 5
        data[at : at + 4] = struct.pack(">HH", 65500, 65500)
    return bytes(data)


TEXT = chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(50 << 20)))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "the file is empty"),
        (b"<html></html>", "not an image of a known format"),
        (huge("jpg"), "4290250000 pixels"),
        (huge("gif"), "4290250000 pixels"),
        (png((65500, 65500), 8, 2, bytes(99)), "4290250000 pixels"),
        (b"P6 65500 65500 255\n" + bytes(99), "4290250000 pixels"),
        (png((12000, 9000), 8, 2, bytes(99)), "12000 x 9000 pixels, the limit is 100000000"),
        (png((20, 20), 8, 2, bytes(61 * 20), TEXT), "Decompressed data too large"),
        (png((20, 20), 8, 2, bytes(61 * 20), TEXT.replace(b"zTXt", b"iCCP")), "."),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n", "not an image of a known format"),
    ],
)
def test_what_cannot_be_an_image_is_refused_at_once_without_memory(data, message, tmp_path):
    (tmp_path / "bad.jpg").write_bytes(data)
    start, peak = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises((OSError, ValueError), match=message):
        recode(tmp_path / "bad.jpg", KEEP)
    assert time.perf_counter() - start < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 64 << 10  # KiB


def test_pipes_and_enormous_files_are_refused_unread(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(ValueError, match="not a regular file"):
        recode(tmp_path / "pipe.jpg", KEEP)
    (tmp_path / "long.jpg").touch()
    os.truncate(tmp_path / "long.jpg", 1 << 40)
    with pytest.raises(ValueError, match="1099511627776 bytes, the limit is"):
        recode(tmp_path / "long.jpg", KEEP)
