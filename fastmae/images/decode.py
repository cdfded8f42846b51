"""Compressed image bytes to uint8 pixels."""

import io

import numpy as np
from PIL import Image, UnidentifiedImageError

from fastmae.errors import InputError, SampleError
from fastmae.optional import require

MAX_PIXELS = 100_000_000  # a header may claim anything; this much is 300 MB of pixels

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "PPM", "TIFF")
"""What Pillow may read (MPO is JPEG to it), whatever a file is named: some others are programs that Ghostscript would run."""

_COLORSPACE = {1: "GRAY", 3: "RGB"}


class DecodeError(SampleError):
    """The bytes are no image that can be used; the message says why."""


def decode(data: bytes | memoryview, channels: int = 3, into: np.ndarray | None = None) -> np.ndarray:
    """Pixels (H, W, C) uint8 of a JPEG, or of anything else that Pillow reads; ``channels`` 3 is RGB, 1 is grey.

    ``into`` is memory, uint8 (n,), that a JPEG's pixels are written into if they fit; the result then lies in it. Raises
    DecodeError on damaged or truncated data and on images above ``MAX_PIXELS``, InputError on other ``channels``.
    """
    if channels not in _COLORSPACE:
        raise InputError(f"images from files have 1 or 3 channels, {channels} were asked for")
    simplejpeg = require("simplejpeg", "decoding JPEGs")
    try:
        if data[:2] == b"\xff\xd8":
            height, width, _, _ = simplejpeg.decode_jpeg_header(data)
            _check_size(height, width)
            is_roomy = into is not None and into.size >= height * width * channels
            return simplejpeg.decode_jpeg(data, _COLORSPACE[channels], buffer=into if is_roomy else None)
        return _decode_with_pillow(data, channels)
    except (DecodeError, MemoryError):  # the second says nothing of the image
        raise
    except UnidentifiedImageError as error:  # whose own text names an address in memory
        raise DecodeError("cannot be decoded, not an image of a known format") from error
    except Exception as error:  # decoders raise many types on damaged bytes, all of which mean the same here
        raise DecodeError(f"cannot be decoded, {error}") from error


def _decode_with_pillow(data: bytes | memoryview, channels: int) -> np.ndarray:
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        _check_size(image.height, image.width)
        picture = to_rgb(image)
        pixels = np.array(picture.convert("L") if channels == 1 else picture)
    return pixels.reshape(*pixels.shape[:2], channels)


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow image as 8-bit RGB; of 16-bit ones the high byte, where Pillow's own conversion saturates."""
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")


def _check_size(height: int, width: int) -> None:
    if not 0 < height * width <= MAX_PIXELS:
        raise DecodeError(f"its header claims {width} x {height} pixels, the limit is {MAX_PIXELS}")
