"""The strict listing of tars: whole ones as any reader lists them, everything else refused with path, offset and reason."""

import bz2
import gzip
import io
import lzma
import os
import re
import struct
import tarfile
import tracemalloc
from contextlib import contextmanager
from pathlib import Path

import pytest
import webdataset as wds
from hypothesis import given
from hypothesis import strategies as st

from fastmae import DataError
from fastmae.data.tar import Member, list_members
from tests.fuzz import FUZZ, MUTATION, NEW, bounded_memory, mutate, put

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


@pytest.mark.parametrize("tar_format", FORMATS)
def test_members_are_listed_where_their_bytes_are(tar_format, tmp_path):
    long = {"ustar": [], "gnu": [101, 300, 5000], "pax": [101, 300, 5000]}[tar_format]
    members = [*MEMBERS, *((f"{'x' * (n - 4)}.jpg", b"%d" % n) for n in long), ("späte/ü.jpg", b"u"), ("empty.txt", b"")]
    path = tmp_path / "a.tar"
    path.write_bytes(make_tar([("folder", b"", {"type": tarfile.DIRTYPE}), *members], tar_format))
    data = path.read_bytes()
    assert [(m.name, data[m.offset : m.offset + m.size]) for m in list_members(path)] == members


def test_headers_for_the_whole_tar_are_read(tmp_path):
    path = tmp_path / "a.tar"
    path.write_bytes(make_tar(MEMBERS, "pax", pax_headers={"comment": "0123456789abcdef"}))
    assert [m.name for m in list_members(path)] == [name for name, _ in MEMBERS]


def test_headers_for_the_whole_tar_are_not_kept_for_every_member(tmp_path):
    path = tmp_path / "a.tar"
    path.write_bytes(pax(b"".join(b"9 %05d=\n" % i for i in range(900)), b"g") + make_tar([(f"{i}", b"") for i in range(2000)]))
    tracemalloc.start()
    assert len(list_members(path)) == 2000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20  # a copy of 900 records takes 36 KiB


def test_sizes_in_base_256_are_read(tmp_path):
    path = tmp_path / "a.tar"
    path.write_bytes(with_header(WHOLE, 0, 124, base_256(700)))
    assert list_members(path)[0] == Member("a.jpg", 512, 700)


def test_a_tar_without_members_is_an_empty_list(tmp_path):
    (tmp_path / "a.tar").write_bytes(bytes(10240))
    assert list_members(tmp_path / "a.tar") == []


def link(kind, **fields):
    return make_tar([*MEMBERS[:2], ("evil.jpg", b"", {"type": kind, "linkname": "/etc/passwd", **fields})])


HOSTILE = {
    "cut inside the first header": (WHOLE[:300], "not a tar, or damaged at offset 0"),
    "cut inside a header": (WHOLE[:2700], "cut inside the header at offset 2560"),
    "cut between members": (WHOLE[:2560], "cut at offset 2560, between two members: the end marker of two zero blocks is miss"),
    "cut before the end": (WHOLE[:END], "cut at offset 4608, between two members"),
    "cut inside the end": (WHOLE[: END + 512], "cut at offset 5120, inside the end marker"),
    "cut inside data": (WHOLE[:600], "member 'a.jpg' at offset 0 states 700 bytes, the file of 600 bytes holds 88 of them"),
    "cut after data": (WHOLE[:1300], "cut at offset 1300, inside the padding after member 'a.jpg' at offset 0"),
    "damaged first header": (put(WHOLE, 10, b"x"), "not a tar, or damaged at offset 0"),
    "damaged second header": (put(WHOLE, 1540, b"x"), "damaged header at offset 1536"),
    "damaged last header": (put(WHOLE, 3590, b"x"), "damaged header at offset 3584"),
    "zeroed header": (put(WHOLE, 1536, bytes(512)), "zeroed block at offset 1536, with data after it from offset 2048 on"),
    "zeroed headers and data": (put(WHOLE, 1536, bytes(1024)), "zeroed block at offset 1536, with data after it"),
    "two tars": (WHOLE + WHOLE, "zeroed block at offset 4608, with data after it from offset 10240 on"),
    "data after the end": (WHOLE + b"x", "zeroed block at offset 4608, with data after it from offset 10240 on"),
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
        "extended header at offset 0 announces a sparse file",
    ),
    "absolute name": (make_tar([("/etc/passwd.jpg", b"x")]), "member '/etc/passwd.jpg' at offset 0: its name is"),
    "name upwards": (make_tar([("a/../../b.jpg", b"x")]), "member 'a/../../b.jpg' at offset 0: its name is"),
    "name upwards in PAX": (make_tar([("a.jpg", b"", {"pax_headers": {"path": "../b"}})], "pax"), "'../b' at offset 0: its"),
    "empty name": (make_tar([*MEMBERS, ("", b"x")]), "member '' at offset 4608: its name is empty"),
    "the same name twice": (make_tar([*MEMBERS, MEMBERS[0]]), "member 'a.jpg' at offset 4608 comes a second time"),
    "one name for all": (pax(b"14 path=a.jpg\n", b"g") + WHOLE, "member 'a.jpg' at offset 2560 comes a second time"),
    "long name cut": (make_tar([("x" * 300, b"")], "gnu")[:700], "extended header at offset 0 is cut"),
    "long name of 50 GiB": (
        with_header(make_tar([("x" * 300, b"")], "gnu"), 0, 124, base_256(50 << 30)),
        "extended headers at offset 0 of more than 1048576 bytes",
    ),
    "long name of nothing": (make_tar([*MEMBERS, ("x" * 300, b"")], "gnu")[: END + 1024], "damaged header at offset 4608"),
    "a record past its header": (pax(b"99 path=x\n") + WHOLE, "extended header at offset 0 is damaged"),
    "a record of no length": (pax(b"0 path=x\n") + WHOLE, "extended header at offset 0 is damaged"),
    "records that overlap": (pax(b"2 " * 200_000 + b"x=\n") + WHOLE, "extended header at offset 0 is damaged"),
    "digits without end": (pax(b"1" * 900_000) + WHOLE, "extended header at offset 0 holds a number of more than 255 digits"),
    "headers without end": (pax(b"7 a=bc\n") * 900 + WHOLE, "damaged at offset 0"),
    "large headers without end": (
        pax(b"7007 a=%s\n" % (b"b" * 6999) * 70) * 3 + WHOLE, "extended headers at offset 0 of more than 1048576 bytes"
    ),
    "a thousand records for all": (
        pax(b"".join(b"9 %05d=\n" % i for i in range(600)), b"g") + pax(b"".join(b"9 %05d=\n" % i for i in range(600)), b"g")
        + WHOLE,
        "more than 1000 records for the whole tar",
    ),
    "a page": (b"<html><body>404 not found</body></html>", "not a tar, or damaged at offset 0: its 39 bytes begin with"),
    "empty": (b"", "empty, at offset 0 a tar has a header"),
    "gzip": (gzip.compress(WHOLE), "compressed: cannot be read at random; gunzip it, or stream it"),
    "bzip2": (bz2.compress(WHOLE), "compressed: cannot be read at random; gunzip it, or stream it"),
    "xz": (lzma.compress(WHOLE), "compressed: cannot be read at random; gunzip it, or stream it"),
    "zstd": (b"\x28\xb5\x2f\xfd" + os.urandom(600), "compressed: cannot be read at random; gunzip it, or stream it"),
}  # fmt: skip


@contextmanager
def refused(path: Path, data: bytes, message: str):
    """``data`` stands at ``path``; what is done with it raises a DataError that begins with the path and holds ``message``."""
    path.write_bytes(data)
    with pytest.raises(DataError) as caught:
        yield
    assert str(caught.value).startswith(f"{path}: ") and message in str(caught.value)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_tar_that_is_not_whole_and_harmless_is_refused_with_its_place(name, tmp_path):
    tracemalloc.start()
    with refused(tmp_path / "a.tar", *HOSTILE[name]):
        list_members(tmp_path / "a.tar")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 32 << 20  # bytes; the file's own length at most, whatever it claims


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("nowhere"), lambda path: None])
def test_what_is_no_file_is_refused(make, tmp_path):
    make(tmp_path / "a.tar")
    with pytest.raises(DataError, match=re.escape(f"{tmp_path}/a.tar: not a file")):
        list_members(tmp_path / "a.tar")


def test_a_tar_cut_anywhere_is_refused(tmp_path):
    path = tmp_path / "a.tar"
    for cut in [*range(0, END + 1024, 37), *range(0, END + 1024, 512)]:
        path.write_bytes(WHOLE[:cut])
        with pytest.raises(DataError):
            list_members(path)
    path.write_bytes(WHOLE[: END + 1024])
    assert len(list_members(path)) == 4


def made_by_webdataset() -> bytes:
    file = io.BytesIO()
    with wds.TarWriter(file) as writer:
        for i in range(3):
            writer.write({"__key__": f"s{i}", "jpg": bytes(i * 400), "cls": i})
    return file.getvalue()


SEEDS = [
    WHOLE,
    make_tar([(f"{'y' * 300}/{'x' * 200}.jpg", b"1" * 600), *MEMBERS], "gnu"),
    make_tar([(f"{'y' * 300}/ü.jpg", b"2" * 10), *MEMBERS], "pax", pax_headers={"comment": "all"}),
    make_tar([("a.jpg", b"", {"pax_headers": {"mtime": "1.5", "SCHILY.xattr.user.x": "y", "path": "b.jpg"}})], "pax"),
    with_header(WHOLE, 2560, 124, base_256(512)),
    made_by_webdataset(),
]
SEED = st.integers(0, len(SEEDS) - 1)


def check_listing(path: Path, data: bytes) -> bool:
    """Whether ``data`` is listed; if so, as ``tarfile`` lists it, and to the last byte that is not zero."""
    path.write_bytes(data)
    try:
        members = list_members(path)
    except DataError as error:
        assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
        return False
    with tarfile.open(path, "r:", encoding="utf-8") as tar:
        assert [(m.name, m.offset_data, m.size) for m in tar if m.isfile()] == members
        assert not data[tar.offset :].strip(b"\0") and len(data) - tar.offset >= 1024
    return True


@pytest.mark.slow
def test_no_mutation_of_a_tar_causes_another_error(tmp_path):
    listed = []

    @FUZZ
    @given(SEED, st.lists(MUTATION, max_size=3))
    def check(seed, mutations):
        with bounded_memory(10 << 20):
            listed.append(check_listing(tmp_path / "a.tar", mutate(SEEDS[seed], mutations)))

    check()
    assert 0.05 < sum(listed) / len(listed) < 0.95  # both ways out were taken


@pytest.mark.slow
def test_no_mutation_of_headers_with_right_checksums_causes_another_error(tmp_path):
    listed = []

    @FUZZ
    @given(SEED, st.lists(st.tuples(st.integers(0, 9), st.integers(0, 511), NEW), min_size=1, max_size=3))
    def check(seed, edits):
        data = SEEDS[seed]
        blocks = [at for at in range(0, len(data), 512) if data[at + 257 : at + 262] == b"ustar"]
        for number, place, new in edits:
            at = blocks[number % len(blocks)]
            # The fields that mean something, kind and size above all, more often than their share of the header.
            place = {0: 124, 1: 156, 2: 0, 3: 345}.get(place % 8, place)
            data = with_header(data, at, place, new[: 512 - place])
            if place % 3 == 0:  # what an extended header holds
                data = put(data, at + 512, new)
        with bounded_memory(10 << 20):
            listed.append(check_listing(tmp_path / "a.tar", data))

    check()
    assert 0.05 < sum(listed) / len(listed) < 0.95
