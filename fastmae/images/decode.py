"""Compressed image bytes to uint8 pixels."""

import io

import numpy as np
from PIL import Image, UnidentifiedImageError

from fastmae.errors import InputError, SampleError
from fastmae.optional import require

MAX_PIXELS = 100_000_000  # a header may state anything; this is 300 MB of pixels

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "PPM", "TIFF")
"""Formats that Pillow may read (MPO is JPEG to it), whatever a file's name: some others are programs for Ghostscript."""

_COLORSPACE = {1: "GRAY", 3: "RGB"}


class DecodeError(SampleError):
    """The bytes are not a usable image; the message gives the reason."""


def decode(data: bytes | memoryview, channels: int = 3, into: np.ndarray | None = None) -> np.ndarray:
    """Pixels (H, W, C) uint8 of a JPEG, or of anything else that Pillow reads; ``channels`` 3 is RGB, 1 is grey.

    ``into``: memory, uint8 (n,), for the pixels of a JPEG, used if they fit. Raises DecodeError on damaged or truncated data
    and on images above ``MAX_PIXELS``, InputError on other ``channels``.
    """
    if channels not in _COLORSPACE:
        raise InputError(f"channels must be 1 or 3 for images from files, got {channels}")
    simplejpeg = require("simplejpeg", "decoding JPEGs")
    try:
        if data[:2] == b"\xff\xd8":
            height, width, _, _ = simplejpeg.decode_jpeg_header(data)
            check_size(height, width)
            fits = into is not None and into.size >= height * width * channels
            return simplejpeg.decode_jpeg(data, _COLORSPACE[channels], buffer=into if fits else None)
        return _decode_with_pillow(data, channels)
    except (DecodeError, MemoryError):  # the second is no fault of the image
        raise
    except UnidentifiedImageError as error:  # whose message contains a memory address
        raise DecodeError("cannot be decoded, not an image of a known format") from error
    except Exception as error:  # decoders raise many types on damaged bytes
        raise DecodeError(f"cannot be decoded, {error}") from error


def _decode_with_pillow(data: bytes | memoryview, channels: int) -> np.ndarray:
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        check_size(image.height, image.width)
        picture = to_rgb(image)
        pixels = np.array(picture.convert("L") if channels == 1 else picture)
    return pixels.reshape(*pixels.shape[:2], channels)


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow image as 8-bit RGB; 16-bit ones by their high byte, where Pillow's own conversion saturates."""
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")


def check_size(height: int, width: int) -> None:
    """Raise DecodeError on an image of no pixels or of more than ``MAX_PIXELS``."""
    if not 0 < height * width <= MAX_PIXELS:
        raise DecodeError(f"its header states {width} x {height} pixels, the limit is {MAX_PIXELS}")
