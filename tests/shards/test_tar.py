"""The strict listing of tars: complete ones as any reader lists them, everything else refused with path, offset and reason."""

import io
import os
import re
import tarfile
import tracemalloc
from pathlib import Path

import pytest
import webdataset as wds
from hypothesis import strategies as st

from fastmae import DataError
from fastmae.shards.tar import Member, list_members
from tests.support.fuzz import MUTATION, NEW, bounded_memory, every_draw, fuzz, mutate, put
from tests.support.tars import END, FORMATS, HOSTILE, MEMBERS, WHOLE, base_256, make_tar, pax, refused, with_header


@pytest.mark.parametrize("tar_format", FORMATS)
def test_members_are_listed_with_their_offsets(tar_format, tmp_path):
    long = {"ustar": [], "gnu": [101, 300, 5000], "pax": [101, 300, 5000]}[tar_format]
    members = [*MEMBERS, *((f"{'x' * (n - 4)}.jpg", b"%d" % n) for n in long), ("späte/ü.jpg", b"u"), ("empty.txt", b"")]
    path = tmp_path / "a.tar"
    path.write_bytes(make_tar([("folder", b"", {"type": tarfile.DIRTYPE}), *members], tar_format))
    data = path.read_bytes()
    assert [(m.name, data[m.offset : m.offset + m.size]) for m in list_members(path)] == members


def test_global_headers_are_read(tmp_path):
    path = tmp_path / "a.tar"
    path.write_bytes(make_tar(MEMBERS, "pax", pax_headers={"comment": "0123456789abcdef"}))
    assert [m.name for m in list_members(path)] == [name for name, _ in MEMBERS]


def test_global_headers_are_not_copied_for_every_member(tmp_path):
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


@pytest.mark.parametrize("name", HOSTILE)
def test_a_damaged_or_hostile_tar_is_refused_with_the_offset(name, tmp_path):
    tracemalloc.start()
    with refused(tmp_path / "a.tar", *HOSTILE[name]):
        list_members(tmp_path / "a.tar")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 32 << 20  # bytes; the file's own length at most, whatever its headers state


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("nowhere"), lambda path: None])
def test_other_than_regular_files_are_refused(make, tmp_path):
    make(tmp_path / "a.tar")
    with pytest.raises(DataError, match=re.escape(f"{tmp_path}/a.tar: not a file")):
        list_members(tmp_path / "a.tar")


def test_a_tar_truncated_anywhere_is_refused(tmp_path):
    path = tmp_path / "a.tar"
    for length in [*range(0, END + 1024, 37), *range(0, END + 1024, 512)]:
        path.write_bytes(WHOLE[:length])
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


@every_draw
def test_no_mutation_of_a_tar_causes_another_error(draw, tmp_path):
    listed = []

    @fuzz(draw, SEED, st.lists(MUTATION, max_size=3))
    def check(seed, mutations):
        with bounded_memory(10 << 20):
            listed.append(check_listing(tmp_path / "a.tar", mutate(SEEDS[seed], mutations)))

    assert 0.05 < sum(listed) / len(listed) < 0.95  # both ways out were taken


@every_draw
def test_no_mutation_of_headers_with_right_checksums_causes_another_error(draw, tmp_path):
    listed = []

    @fuzz(draw, SEED, st.lists(st.tuples(st.integers(0, 9), st.integers(0, 511), NEW), min_size=1, max_size=3))
    def check(seed, edits):
        data = SEEDS[seed]
        blocks = [at for at in range(0, len(data), 512) if data[at + 257 : at + 262] == b"ustar"]
        for number, field, new in edits:
            at = blocks[number % len(blocks)]
            # The fields that mean something, kind and size above all, more often than their share of the header.
            field = {0: 124, 1: 156, 2: 0, 3: 345}.get(field % 8, field)
            data = with_header(data, at, field, new[: 512 - field])
            if field % 3 == 0:  # what an extended header holds
                data = put(data, at + 512, new)
        with bounded_memory(10 << 20):
            listed.append(check_listing(tmp_path / "a.tar", data))

    assert 0.05 < sum(listed) / len(listed) < 0.95
