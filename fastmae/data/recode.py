"""One image file to the JPEG bytes that a shard stores.

A JPEG that needs no change (three or one channels, 8 bits, upright, not above the size asked for) is kept byte for byte;
everything else becomes an RGB JPEG: resized by its shorter side, antialiased, never upwards; turned as its EXIF says; CMYK,
16-bit, palette and alpha converted; of an animation the first frame.
"""

import io
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps

from fastmae.data.decode import MAX_PIXELS, DecodeError, decode, to_rgb

_ORIENTATION = 0x0112  # the EXIF tag


@dataclass(frozen=True, kw_only=True)
class Recode:
    """What to do to each image."""

    resize: int | None = 256
    """Shorter side in pixels, never upwards; None keeps the size."""
    quality: int = 90
    """JPEG quality, 1 to 95, of images that are encoded anew."""
    exif_rotate: bool = True
    """Turn images as their EXIF orientation says; False ignores it, as the reference's loader does."""


def recode(path: Path, settings: Recode) -> bytes:
    """JPEG bytes of the image at ``path``. Raises OSError or ValueError on one that cannot be read."""
    data = path.read_bytes()
    if not data:
        raise ValueError("the file is empty")
    with Image.open(io.BytesIO(data)) as image:
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels, the limit is {MAX_PIXELS}")
        is_large = settings.resize is not None and min(image.size) > settings.resize
        is_turned = settings.exif_rotate and image.getexif().get(_ORIENTATION, 1) not in (0, 1)
        is_plain = image.format == "JPEG" and image.mode in ("RGB", "L")
        if is_plain and not is_large and not is_turned and _loader_takes(data):
            return data
        picture = to_rgb(ImageOps.exif_transpose(image) if is_turned else image)
        if is_large:
            scale = settings.resize / min(picture.size)
            size = tuple(max(settings.resize, round(side * scale)) for side in picture.size)
            picture = picture.resize(size, Image.Resampling.BICUBIC)
        out = io.BytesIO()
        picture.save(out, "JPEG", quality=settings.quality, subsampling="4:2:0")
        return out.getvalue()


def _loader_takes(data: bytes) -> bool:
    """Whether training will be able to decode these bytes: its decoder is stricter than Pillow."""
    try:
        decode(data)
    except DecodeError:
        return False
    return True
