"""Files that are inconsistent, truncated, or would run code: images in place of JPEGs, and pickles."""

import io
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from fastmae.shards.index_tars import index_shards
from tests.support.pictures import make_picture


def encode(image, kind="JPEG", **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def png_of(width=48, height=48):
    """A PNG whose header states so many pixels, and that has none."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IEND", b"")


class Bomb:
    """Leaves a mark where it is unpickled."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return (open, (self.mark, "w"))


GOOD = encode(make_picture(1), quality=90)


FRAME = GOOD.index(b"\xff\xc0") + 5  # height and width stand here


SCAN = GOOD.index(b"\xff\xda") + 20


def jpeg_header(height, width):
    return GOOD[:FRAME] + struct.pack(">HH", height, width) + GOOD[FRAME + 4 :]


def with_exif():
    exif = Image.Exif()
    exif[0x0112] = 6
    return encode(make_picture(1), exif=exif)


REPLACED = {  # what cannot be used, and a word of the reason
    "a JPEG truncated in its data": (GOOD[: len(GOOD) // 2], "cannot be decoded"),
    "a JPEG truncated in its header": (GOOD[:100], "cannot be decoded"),
    "a JPEG without its last bytes": (GOOD[:-20], "cannot be decoded"),
    "a JPEG with a damaged scan": (GOOD[:SCAN] + bytes(300) + GOOD[SCAN + 300 :], "cannot be decoded"),
    "a JPEG with a flipped marker": (GOOD[:FRAME - 4] + b"\x01" + GOOD[FRAME - 3 :], "cannot be decoded"),
    "a header of 65500 x 65500": (jpeg_header(65500, 65500), "states 65500 x 65500 pixels"),
    "a header of 12000 x 12000": (jpeg_header(12000, 12000), "states 12000 x 12000 pixels"),
    "a header of no height": (jpeg_header(0, 64), "cannot be decoded"),
    "a PNG header of 60000 x 60000": (png_of(width=60000, height=60000), "Image size (3600000000 pixels)"),
    "a PNG without pixels": (png_of(), "cannot be decoded"),
    "a page of HTML": (b"<!doctype html><html><body>404</body></html>", "cannot be decoded"),
    "an SVG": (b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>', "cannot be decoded"),
    "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) (w) file\nshowpage\n", "cannot be decoded"),
    "zeros": (bytes(4000), "cannot be decoded"),
    "noise": (np.random.default_rng(0).bytes(4000), "cannot be decoded"),
    "two bytes": (b"\xff\xd8", "cannot be decoded"),
    "a pickle": (b"\x80\x04cos\nsystem\n(S'true'\ntR.", "cannot be decoded"),
    "a truncated WebP": (encode(make_picture(1), "WEBP")[:300], "cannot be decoded"),
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
