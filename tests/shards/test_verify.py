"""Verifying shards: no damaged byte and no lie of an index goes unseen, and its place is named."""

import json
import os
import random
import re
import shutil
import tarfile

import numpy as np
import pytest

from fastmae import DataError
from fastmae.shards.index import Index
from fastmae.shards.index_tars import index_shards
from fastmae.shards.verify import verify_shards
from fastmae.train.cli.shards import info
from tests.support.shards import write_json
from tests.support.tars import make_tar


def flip(path, at, bits=0xFF):
    """Change the byte at ``at`` of a file."""
    data = bytearray(path.read_bytes())
    data[at] ^= bits
    path.write_bytes(data)


def member(path, suffix):
    """Name and offset of the data of the first member of a tar that ends in ``suffix``."""
    with tarfile.open(path) as tar:
        info = next(m for m in tar if m.name.endswith(suffix))
    return info.name, info.offset_data


@pytest.mark.parametrize("decode_images", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
def test_whole_shards_give_no_line(workers, decode_images, shard_folder, tmp_path):
    calls = []
    assert not verify_shards(
        shard_folder, decode_images=decode_images, workers=workers, progress=lambda *n: calls.append(n)
    )  # fmt: skip
    assert calls == [(i, 4) for i in (1, 2, 3, 4)]
    index_shards(shard_folder, tmp_path)
    assert not verify_shards(tmp_path, decode_images=decode_images, workers=workers)


def test_every_damaged_byte_is_reported_with_its_file(small_folder, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(small_folder, folder)
    files = sorted(folder.iterdir())
    assert len(files) == 5 and not verify_shards(folder)
    rng = random.Random(0)
    for path in files:
        whole = path.read_bytes()
        for _ in range(40):
            flip(path, rng.randrange(len(whole)), rng.randrange(1, 256))
            lines = verify_shards(folder)
            assert lines and all(str(path) in line for line in lines)
            path.write_bytes(whole)


@pytest.mark.parametrize("new", [b" ", b"\t", b"\n", b"\r", b"#"])
def test_no_byte_of_the_index_may_change_even_where_it_means_nothing(new, copy):
    for name, blank in (("index.json", b"\n"), ("index.json", b" "), ("index.npy", b" "), ("index.npy", b"\n")):
        whole = (copy / name).read_bytes()
        at = whole.rindex(blank, 0, whole.index(b"\n") + 1 if name == "index.npy" else None)
        (copy / name).write_bytes(whole[:at] + new + whole[at + 1 :])
        lines = verify_shards(copy)
        assert (len(lines) == 1 and f"{name}: " in lines[0]) if new != blank else lines == []
        (copy / name).write_bytes(whole)


SHARD = "shard-000001.tar"


def flip_in(suffix, shift=0, bits=1):
    return lambda folder: flip(folder / SHARD, member(folder / SHARD, suffix)[1] + shift, bits)


def add_byte(folder):
    with (folder / SHARD).open("ab") as file:
        file.write(b"\0")


def double(folder):
    """The index lists a shard twice."""
    index = Index.load(folder)
    save(index, shards=(*index.shards[:3], index.shards[2]), table=index.table[[*range(30), *range(20, 30)]], renumber=True)
    (folder / "shard-000003.tar").unlink()


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (flip_in(".jpg", 30), [r"{shard}: '{jpg}' at offset {at}: its \d+ bytes are not those that were indexed \(checksum\)"]),
        (flip_in(".jpg", -512), [r"{shard}: damaged header at offset {header}"]),
        (flip_in(".cls"), [r"{shard}: '{jpg}' at offset {at}: class \d in the tar, \d in the index"]),
        (flip_in(".cls", 0, 64), [r"{shard}: member '{cls}' at offset \d+: a class must be an integer"]),
        (flip_in(".cls", 20), [r"{shard}: its bytes are not those that were indexed \(hash\), though all images are intact"]),
        (lambda f: flip(f / SHARD, 10, 1), [r"{shard}: not a tar, or damaged at offset 0"]),
        (lambda f: (f / SHARD).unlink(), [r"{shard}: missing; restore it"]),
        (lambda f: (f / SHARD).write_bytes(b""), [r"{shard}: 0 bytes, .* 10 of 10 images lie past", r"{shard}: empty"]),
        (lambda f: os.truncate(f / SHARD, 5120), [r"{shard}: 5120 bytes, the index says \d+, and 9 of 10 images lie past its",
                                                  r"{shard}: .*(cut|states)"]),
        (add_byte, [r"{shard}: \d+ bytes, the index says \d+, and 0 of 10 images"]),
        (lambda f: shutil.copy(f / SHARD, f / "more.tar"), [r"more.tar: not in the index, its samples are not used"]),
        (lambda f: (f / ".unfinished").touch(), [r"copy: the build of these shards was not finished"]),
        (double, [r"shard-000002.tar: listed as the same bytes as .*shard-000002.tar, its samples come twice"]),
        (lambda f: (f / "index.json").unlink(), [r"index.json: cannot be read, No such file"]),
        (lambda f: (f / "index.npy").unlink(), [r"index.npy: cannot be read"]),
        (lambda f: (flip_in(".jpg")(f), (f / "shard-000003.tar").unlink()), [r"{shard}: .*checksum", r"3.tar: missing"]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("workers", [0, 2])
def test_damage_is_one_line_that_names_its_place(workers, damage, expected, copy):
    (jpg, at), (cls, _) = (member(copy / SHARD, suffix) for suffix in (".jpg", ".cls"))
    damage(copy)
    lines = verify_shards(copy, workers=workers)
    assert len(lines) == len(expected)
    for line, pattern in zip(lines, expected, strict=True):
        for name, value in {"shard": copy / SHARD, "jpg": jpg, "cls": cls, "at": at, "header": at - 512}.items():
            pattern = pattern.replace(f"{{{name}}}", re.escape(str(value)))
        assert re.search(pattern, line) and "\n" not in line


def test_images_behind_a_damaged_header_are_still_checked(copy):
    """The listing ends at the damage; what the index knows of the rest is read all the same."""
    last = int(Index.load(copy).table["offset"][19])
    flip(copy / SHARD, 10)
    flip(copy / SHARD, last + 3)
    lines = verify_shards(copy)
    assert len(lines) == 2 and "damaged at offset 0" in lines[0]
    assert f".jpg' at offset {last}: its " in lines[1] and "(checksum)" in lines[1]
    flip(copy / SHARD, last + 3)
    flip(copy / SHARD, last - 512 + 130)  # where its header states its size
    lines = verify_shards(copy)
    assert len(lines) == 2 and f".jpg' at offset {last}: the header before it does not state its" in lines[1]


def test_tars_beside_the_indexed_ones_are_seen_wherever_the_index_lies(copy, tmp_path):
    index_shards(copy, tmp_path / "index")
    shutil.copy(copy / SHARD, copy / "more.tar")
    (line,) = verify_shards(tmp_path / "index")
    assert "copy/more.tar: not in the index" in line


def test_images_that_no_decoder_takes_are_named_if_asked_for(tmp_path, image_folder):
    photo = next(image_folder.rglob("*.jpg")).read_bytes()
    members = [("a.jpg", photo), ("b.jpg", b"no image"), ("c.jpg", photo[:-40])]
    (tmp_path / "a.tar").write_bytes(make_tar(members))
    index_shards(tmp_path)
    assert not verify_shards(tmp_path)
    lines = verify_shards(tmp_path, decode_images=True)
    assert [line.split(" at offset")[0] for line in lines] == [f"{tmp_path}/a.tar: 'b.jpg'", f"{tmp_path}/a.tar: 'c.jpg'"]
    assert all("cannot be decoded" in line for line in lines)


def save(index, *, renumber=False, **changes):
    """Write ``index`` with ``changes``, all its hashes made right."""
    fields = {"folder": index.folder, "classes": index.classes, "build": index.build}
    table = changes.pop("table", index.table).copy()
    if renumber:
        table["shard"] = np.repeat(np.arange(4), 10)
    Index(**{**fields, "shards": index.shards, "table": table, **changes}).save()


def lie(field, row, value):
    def change(folder):
        index = Index.load(folder)
        table = index.table.copy()
        table[field][row] = int(table[field][row]) + value if value < 2**40 else value
        save(index, table=table)

    return change


def swap(folder):
    """Two rows of one shard trade their offsets and sizes: all hashes and sums stay right."""
    index = Index.load(folder)
    table = index.table.copy()
    for field in ("offset", "size"):
        table[field][[3, 4]] = table[field][[4, 3]]
    save(index, table=table)


def repeat(folder):
    """One sample stands in two rows, another in none."""
    index = Index.load(folder)
    table = index.table.copy()
    table[4] = table[3]
    save(index, table=table)


def forget(folder):
    """The index leaves a sample out."""
    index = Index.load(folder)
    shards = list(index.shards)
    shards[0] = type(shards[0])(**{**vars(shards[0]), "samples": 9})
    save(index, shards=tuple(shards), table=np.delete(index.table, 3))


def change_shard(**fields):
    def change(folder):
        shards = json.loads((folder / "index.json").read_text())["shards"]
        write_json(folder, shards=[{**shards[0], **fields}, *shards[1:]])

    return change


@pytest.mark.parametrize(
    ("tell", "message"),
    [
        (lie("offset", 3, 512), r"shard-000000.tar: the index lists \d+ bytes at offset \d+, the tar has no such image"),
        (lie("offset", 3, 2**63 - 10), r"shard-000000.tar: the index lists \d+ bytes at offset 9223372036854775798 of a shard"),
        (lie("offset", 3, 2**64 - 10), r"shard-000000.tar: the index lists \d+ bytes at offset"),
        (lie("size", 3, 1), r"shard-000000.tar: the index lists \d+ bytes at offset \d+, the tar has no such image"),
        (lie("size", 3, -1), r"shard-000000.tar: the index lists \d+ bytes at offset \d+, the tar has no such image"),
        (lie("label", 3, 1), r"shard-000000.tar: '.*.jpg' at offset \d+: class \d in the tar, \d in the index"),
        (
            lie("check", 3, 1),
            r"shard-000000.tar: '.*.jpg' at offset \d+: its \d+ bytes are not those that were indexed \(checks",
        ),
        (lie("shard", 3, 1), r"index.npy: its samples per shard are not those of index.json"),
        (lie("shard", 3, 4), r"index.npy: names shard 4 of 4"),
        (swap, r"shard-000000.tar: '.*.jpg' at offset \d+: "),
        (repeat, r"shard-000000.tar: '.*.jpg' at offset \d+: is in the index twice"),
        (forget, r"shard-000000.tar: '.*.jpg' at offset \d+ is not in the index"),
        (change_shard(xxh3="0" * 16), r"shard-000000.tar: its bytes are not those that were indexed \(hash\)"),
        (change_shard(samples=9), r"index.npy: its samples per shard"),
        (change_shard(bytes=10**6), r"shard-000000.tar: \d+ bytes, the index says 1000000"),
        (change_shard(bytes=-1), r"index.json: damaged, .*not a shard"),
        (change_shard(bytes=2**70), r"index.json: damaged, .*not a shard"),
        (change_shard(samples="10"), r"index.json: damaged, .*not a shard"),
        (change_shard(samples=True), r"index.json: damaged, .*not a shard"),
        (change_shard(name=7), r"index.json: damaged, .*not a shard"),
        (change_shard(name="a\0b"), r"index.json: damaged, .*not a file's name"),
        (change_shard(name="\ud800"), r"index.json: damaged, "),
        (change_shard(name=""), r"index.json: damaged, .*not a file's name"),
        (change_shard(name="x" * 5000), r"x: (missing|cannot be read)"),
        (change_shard(name="shard-000001.tar"), r"shard-000001.tar: "),
        (change_shard(more=1), r"index.json: damaged, "),
        (lambda f: write_json(f, samples=36), r"index.npy: does not match index.json"),
        (lambda f: write_json(f, samples="37"), r"index.npy: does not match index.json"),
        (lambda f: write_json(f, shards={}), r"index.npy: names shard 3 of 0"),
        (lambda f: write_json(f, shards=7), r"index.json: damaged, "),
        (lambda f: write_json(f, classes="abc"), r"index.json: damaged, .*classes are a list of names"),
        (lambda f: write_json(f, classes=[1, 2, 3]), r"index.json: damaged, .*classes are a list of names"),
        (lambda f: write_json(f, build=[]), r"index.json: damaged, .*build is an object"),
        (lambda f: write_json(f, format=1), r"index.json: format 1, this version reads"),
        (lambda f: write_json(f, format=None), r"index.json: format None, this version reads"),
    ],
)
def test_an_index_that_lies_is_caught_though_its_hashes_are_right(tell, message, copy):
    tell(copy)
    assert any(re.search(message, line) for line in verify_shards(copy))


def test_a_name_that_no_file_can_have_is_refused(copy):
    change_shard(name="x" * 5000)(copy)
    with pytest.raises(DataError, match=r"xxx: (missing|cannot be read)"):
        Index.load(copy)


def test_info_describes_a_folder(shard_folder, tmp_path, capsys):
    info(shard_folder)
    text = capsys.readouterr().out
    total = sum(p.stat().st_size for p in shard_folder.glob("*.tar"))
    for part in ("shards: 4", "samples: 37", f"bytes: {total} ", "classes: 3 (ant 13, bee 12, cat 12)",
                 "made by: fastmae shards build", "samples_per_shard=10",
                 f"fingerprint: {Index.load(shard_folder).fingerprint}"):  # fmt: skip
        assert part in text
    (tmp_path / "a.tar").write_bytes(make_tar([(f"{i}.{e}", b"%d" % i) for i in range(1, 9) for e in ("jpg", "cls")]
                                              + [("x.jpg", b"x")]))  # fmt: skip
    index_shards(tmp_path)
    info(tmp_path)
    text = capsys.readouterr().out
    for part in ("classes: 8 (1 1, 2 1, 3 1, 4 1, 5 1, ...), 1 samples without one", "made by: fastmae shards index"):
        assert part in text
    (tmp_path / "a.tar").unlink()
    with pytest.raises(DataError, match=r"a.tar: missing"):
        info(tmp_path)
