"""Tars made byte by byte: complete ones, and all kinds that are damaged, truncated or hostile."""

import bz2
import gzip
import io
import lzma
import os
import struct
import tarfile
from contextlib import contextmanager
from pathlib import Path

import pytest

from fastmae import DataError
from tests.support.fuzz import put

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def add(tar: tarfile.TarFile, name: str, data: bytes = b"", **fields) -> None:
    """Put a member into ``tar``; ``fields`` go into its header."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    tar.addfile(info, io.BytesIO(data))


def make_tar(members, tar_format="ustar", **options) -> bytes:
    """The bytes of a tar of (name, data) pairs, or (name, data, header fields) triples."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=FORMATS[tar_format], **options) as tar:
        for name, data, *fields in members:
            add(tar, name, data, **(fields[0] if fields else {}))
    return file.getvalue()


def seal(block: bytes) -> bytes:
    """A header with its checksum made right."""
    block = bytearray(block)
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def with_header(data: bytes, at: int, field: int, new: bytes) -> bytes:
    """``data`` with ``new`` in the header at ``at``, whose checksum is right."""
    return put(data, at, seal(put(data[at : at + 512], field, new)))


def base_256(number: int) -> bytes:
    """A size field of 12 bytes as GNU writes what octal cannot hold; negative numbers too."""
    return bytes([0x80 if number >= 0 else 0xFF]) + struct.pack(">q", number).rjust(11, b"\0" if number >= 0 else b"\xff")


def pax(payload: bytes, kind: bytes = b"x") -> bytes:
    """An extended header with ``payload``, before whatever follows."""
    info = tarfile.TarInfo("pax")
    info.type, info.size = kind, len(payload)
    return info.tobuf(tarfile.USTAR_FORMAT) + payload + bytes(-len(payload) % 512)


MEMBERS = [("a.jpg", b"A" * 700), ("a.cls", b"3"), ("folder/b.jpg", b"B" * 512), ("folder/b.cls", b"0")]


WHOLE = make_tar(MEMBERS)  # headers at 0, 1536, 2560, 3584; the end at 4608


END = 4608


def link(kind, **fields):
    return make_tar([*MEMBERS[:2], ("evil.jpg", b"", {"type": kind, "linkname": "/etc/passwd", **fields})])


HOSTILE = {
    "truncated inside the first header": (WHOLE[:300], "not a tar, or damaged at offset 0"),
    "truncated inside a header": (WHOLE[:2700], "truncated inside the header at offset 2560"),
    "truncated between members": (WHOLE[:2560], "truncated at offset 2560, between two members: the end marker of two"),
    "truncated before the end": (WHOLE[:END], "truncated at offset 4608, between two members"),
    "truncated inside the end": (WHOLE[: END + 512], "truncated at offset 5120, inside the end marker"),
    "truncated inside data": (WHOLE[:600], "member 'a.jpg' at offset 0 states 700 bytes, the file of 600 bytes holds 88 of"),
    "truncated after data": (WHOLE[:1300], "truncated at offset 1300, inside the padding after member 'a.jpg' at offset 0"),
    "damaged first header": (put(WHOLE, 10, b"x"), "not a tar, or damaged at offset 0"),
    "damaged second header": (put(WHOLE, 1540, b"x"), "damaged header at offset 1536"),
    "damaged last header": (put(WHOLE, 3590, b"x"), "damaged header at offset 3584"),
    "zeroed header": (put(WHOLE, 1536, bytes(512)), "zeroed block at offset 1536, with data after it from offset 2048"),
    "zeroed headers and data": (put(WHOLE, 1536, bytes(1024)), "zeroed block at offset 1536, with data after it"),
    "two tars": (WHOLE + WHOLE, "zeroed block at offset 4608, with data after it from offset 10240"),
    "data after the end": (WHOLE + b"x", "zeroed block at offset 4608, with data after it from offset 10240"),
    "50 GiB": (with_header(WHOLE, 2560, 124, base_256(50 << 30)), "'folder/b.jpg' at offset 2560 states 53687091200 bytes"),
    "50 GiB first": (with_header(WHOLE, 0, 124, base_256(50 << 30)), "member 'a.jpg' at offset 0 states 53687091200 bytes"),
    "50 GiB in PAX": (
        make_tar([("a.jpg", b"A", {"pax_headers": {"size": str(50 << 30)}}), *MEMBERS[2:]], "pax"),
        "member 'a.jpg' at offset 0 states 53687091200 bytes",
    ),
    "negative size": (with_header(WHOLE, 2560, 124, base_256(-2560)), "member 'folder/b.jpg' at offset 2560 states a negative"),
    "negative size in PAX": (pax(b"12 size=-99\n") + WHOLE, "extended header at offset 0 is damaged"),
    "no size in PAX": (pax(b"12 size=abc\n") + WHOLE, "extended header at offset 0 is damaged"),
    "two sizes": (pax(b"11 size=10\n", b"g") + WHOLE, "member 'a.jpg' at offset 1024: its headers disagree on its size"),
    "hard link": (link(tarfile.LNKTYPE), "member 'evil.jpg' at offset 2560 is a hard link"),
    "symbolic link": (link(tarfile.SYMTYPE), "member 'evil.jpg' at offset 2560 is a symbolic link"),
    "fifo": (link(tarfile.FIFOTYPE), "member 'evil.jpg' at offset 2560 is a fifo"),
    "character device": (link(tarfile.CHRTYPE, devmajor=1), "member 'evil.jpg' at offset 2560 is a character device"),
    "block device": (link(tarfile.BLKTYPE, devmajor=1), "member 'evil.jpg' at offset 2560 is a block device"),
    "unknown kind": (link(b"V"), "member 'evil.jpg' at offset 2560 is a member of unknown type b'V'"),
    "sparse": (link(tarfile.GNUTYPE_SPARSE), "member 'evil.jpg' at offset 2560 is a sparse file"),
    "sparse in PAX": (
        make_tar([("a.jpg", b"A" * 600, {"pax_headers": {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}})], "pax"),
        "extended header at offset 0 describes a sparse file",
    ),
    "absolute name": (make_tar([("/etc/passwd.jpg", b"x")]), "member '/etc/passwd.jpg' at offset 0: its name is"),
    "name upwards": (make_tar([("a/../../b.jpg", b"x")]), "member 'a/../../b.jpg' at offset 0: its name is"),
    "name upwards in PAX": (make_tar([("a.jpg", b"", {"pax_headers": {"path": "../b"}})], "pax"), "'../b' at offset 0: its"),
    "empty name": (make_tar([*MEMBERS, ("", b"x")]), "member '' at offset 4608: its name is empty"),
    "the same name twice": (make_tar([*MEMBERS, MEMBERS[0]]), "member 'a.jpg' at offset 4608 is a duplicate name"),
    "one name for all": (pax(b"14 path=a.jpg\n", b"g") + WHOLE, "member 'a.jpg' at offset 2560 is a duplicate name"),
    "long name truncated": (make_tar([("x" * 300, b"")], "gnu")[:700], "extended header at offset 0 is truncated"),
    "long name of 50 GiB": (
        with_header(make_tar([("x" * 300, b"")], "gnu"), 0, 124, base_256(50 << 30)),
        "extended headers at offset 0 of more than 1048576 bytes",
    ),
    "long name of nothing": (make_tar([*MEMBERS, ("x" * 300, b"")], "gnu")[: END + 1024], "damaged header at offset 4608"),
    "a record past its header": (pax(b"99 path=x\n") + WHOLE, "extended header at offset 0 is damaged"),
    "a record of no length": (pax(b"0 path=x\n") + WHOLE, "extended header at offset 0 is damaged"),
    "records that overlap": (pax(b"2 " * 200_000 + b"x=\n") + WHOLE, "extended header at offset 0 is damaged"),
    "endless digits": (pax(b"1" * 900_000) + WHOLE, "extended header at offset 0 holds a number of more than 255 digits"),
    "endless headers": (pax(b"7 a=bc\n") * 900 + WHOLE, "damaged at offset 0"),
    "large endless headers": (
        pax(b"7007 a=%s\n" % (b"b" * 6999) * 70) * 3 + WHOLE, "extended headers at offset 0 of more than 1048576 bytes"
    ),
    "a thousand global records": (
        pax(b"".join(b"9 %05d=\n" % i for i in range(600)), b"g") + pax(b"".join(b"9 %05d=\n" % i for i in range(600)), b"g")
        + WHOLE,
        "more than 1000 global records",
    ),
    "a page": (b"<html><body>404 not found</body></html>", "not a tar, or damaged at offset 0: its 39 bytes begin with"),
    "empty": (b"", "empty, at offset 0 a tar must have a header"),
    "gzip": (gzip.compress(WHOLE), "compressed, which allows no random access; decompress it, or"),
    "bzip2": (bz2.compress(WHOLE), "compressed, which allows no random access; decompress it, or"),
    "xz": (lzma.compress(WHOLE), "compressed, which allows no random access; decompress it, or"),
    "zstd": (b"\x28\xb5\x2f\xfd" + os.urandom(600), "compressed, which allows no random access; decompress it, or"),
}  # fmt: skip


@contextmanager
def refused(path: Path, data: bytes, message: str):
    """``data`` at ``path``: reading it raises a DataError that begins with the path and holds ``message``."""
    path.write_bytes(data)
    with pytest.raises(DataError) as caught:
        yield
    assert str(caught.value).startswith(f"{path}: ") and message in str(caught.value)
