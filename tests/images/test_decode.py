"""Decoding: the pixels that Pillow sees, and an error for anything that is not an image."""

import io
import struct
import time

import numpy as np
import pytest
from PIL import Image

from fastmae import InputError
from fastmae.images.decode import DecodeError, decode
from tests.support.pictures import make_picture


def encode(image, kind="JPEG", **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF"])
def test_pixels_are_those_that_pillow_sees(kind):
    data = encode(make_picture(3), kind)
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(image.convert("RGB"), np.int64)
    found = decode(data)
    assert found.dtype == np.uint8 and abs(found.astype(np.int64) - expected).max() <= (1 if kind == "JPEG" else 0)


def test_grey_images_become_three_equal_channels_and_colour_one():
    assert (np.ptp(decode(encode(make_picture(0).convert("L"))), axis=2) == 0).all()
    assert decode(encode(make_picture(0)), channels=1).shape == (48, 64, 1)
    assert decode(encode(make_picture(0), "PNG"), channels=1).shape == (48, 64, 1)


def test_sixteen_bit_images_keep_their_high_byte():
    assert (decode(encode(Image.fromarray(np.full((4, 4), 0x4000, np.uint16)), "PNG")) == 64).all()


def test_other_channels_than_one_or_three_are_refused():
    with pytest.raises(InputError, match="channels must be 1 or 3 for images from files, got 13"):
        decode(GOOD, channels=13)


def test_cmyk_jpegs_are_converted():
    assert decode(encode(Image.new("CMYK", (8, 8), (255, 0, 0, 0)))).shape == (8, 8, 3)


GOOD = encode(make_picture(1))


@pytest.mark.parametrize(
    "data",
    [b"", b"\xff\xd8", b"<html></html>", GOOD[: len(GOOD) // 2], GOOD[:300] + bytes(200) + GOOD[500:], b"GIF89a", bytes(1000)],
    ids=["empty", "two bytes", "html", "truncated", "zeroed inside", "gif header", "zeros"],
)
def test_damaged_bytes_are_an_error(data):
    with pytest.raises(DecodeError):
        decode(data)


@pytest.mark.timing
@pytest.mark.parametrize("size", [(65500, 65500), (12000, 12000)])
def test_a_header_of_too_many_pixels_is_refused_at_once(size):
    at = GOOD.index(b"\xff\xc0") + 5  # height and width of the frame header
    data = GOOD[:at] + struct.pack(">HH", *size) + GOOD[at + 4 :]
    began = time.perf_counter()
    with pytest.raises(DecodeError, match=f"states {size[1]} x {size[0]} pixels"):
        decode(data)
    assert time.perf_counter() - began < 0.1
