"""One image file to the JPEG bytes that a shard stores.

A JPEG that needs no change (three or one channels, 8 bits, upright, not above the size wanted) is kept byte for byte, also one
with more pictures after the first (MPO). Everything else becomes an RGB JPEG: resized by its shorter side, antialiased, never
enlarged; rotated by its EXIF orientation; CMYK, palette and 16 bits (their high byte) converted; alpha dropped; the first frame
of an animation.
"""

import io
import stat
import warnings
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from fastmae.images.decode import FORMATS, DecodeError, check_size, decode, to_rgb

MAX_BYTES = 1 << 30  # of a file; more than any image of ``MAX_PIXELS`` needs

_ORIENTATION = 0x0112  # the EXIF tag
_TURN = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True, kw_only=True)
class Recode:
    """What to do to each image."""

    resize: int | None = 256
    """Shorter side in pixels, never enlarged; None keeps the size."""
    quality: int = 90
    """JPEG quality, 1 to 95, of images that are encoded again."""
    exif_rotate: bool = True
    """Rotate images by their EXIF orientation; False ignores it, as the reference's loader does."""


def recode(path: Path, settings: Recode) -> bytes:
    """JPEG bytes of the image at ``path``. Raises OSError or ValueError on one that cannot be read."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):  # a pipe would block
        raise ValueError("not a regular file")
    if status.st_size > MAX_BYTES:
        raise ValueError(f"{status.st_size} bytes, the limit is {MAX_BYTES}")
    data = path.read_bytes()
    if not data:
        raise ValueError("the file is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, of what is converted or refused here
            return _recode(data, settings)
    except UnidentifiedImageError:
        raise UnidentifiedImageError("not an image of a known format") from None  # Pillow's message contains a memory address
    except (OSError, ValueError):
        raise
    except Exception as error:  # decoders raise many types on damaged bytes
        raise ValueError(f"{type(error).__name__}: {error}") from error


def _recode(data: bytes, settings: Recode) -> bytes:
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        check_size(image.height, image.width)
        is_jpeg = image.format in ("JPEG", "MPO")
        if not is_jpeg:
            image.load()  # Pillow rotates a TIFF when it loads it, and updates its EXIF
        turn = _turn(image) if settings.exif_rotate else None
        is_large = settings.resize is not None and min(image.size) > settings.resize
        is_plain = is_jpeg and image.mode in ("RGB", "L")
        if is_plain and not is_large and turn is None and _is_decodable(data):
            return data
        picture = to_rgb(image)
        if turn is not None:
            picture = picture.transpose(turn)
        if is_large:
            scale = settings.resize / min(picture.size)
            size = tuple(max(settings.resize, round(side * scale)) for side in picture.size)
            picture = picture.resize(size, Image.Resampling.BICUBIC)
        out = io.BytesIO()
        picture.save(out, "JPEG", quality=settings.quality, subsampling="4:2:0", comment=b"")  # a GIF's comment may be too long
        return out.getvalue()


def _turn(image: Image.Image) -> Image.Transpose | None:
    """How to rotate the image upright; None if it is, or if its EXIF cannot be read, which must not cost the image."""
    try:
        return _TURN.get(image.getexif().get(_ORIENTATION))
    except Exception:  # Pillow raises many types on a damaged block
        return None


def _is_decodable(data: bytes) -> bool:
    """Whether the loader's decoder, which is stricter than Pillow, takes these bytes."""
    try:
        decode(data)
    except DecodeError:
        return False
    return True
