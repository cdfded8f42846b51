"""The index and indexed reads: every byte found, every disagreement named."""

import io
import json
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import strategies as st

from fastmae import DataError
from fastmae.errors import SampleError
from fastmae.shards.index import ROW, Index
from fastmae.shards.index_tars import index_shards
from fastmae.shards.read import ShardReader
from tests.support.fuzz import MUTATION, bounded_memory, every_draw, fuzz, mutate
from tests.support.shards import write_json


def test_every_image_is_read_back_byte_for_byte(image_folder, shard_folder):
    reader = pickle.loads(pickle.dumps(ShardReader(Index.load(shard_folder))))  # as a worker gets it
    originals = {p.read_bytes() for p in image_folder.rglob("*.jpg")}
    assert {reader.read(i) for i in range(37)} == originals


def test_more_shards_than_open_files_are_read(shard_folder):
    reader = ShardReader(Index.load(shard_folder))
    reader._max_files = 1
    data = [reader.read(i) for i in (0, 36, 12, 0)]
    assert data[0] == data[3] and len(reader._files) == 1


def test_a_sample_is_named_by_shard_and_key(shard_folder):
    name = ShardReader(Index.load(shard_folder)).name(11)
    assert "shard-000001.tar: " in name and name.endswith(".jpg") and "photo_" in name


def test_fingerprint_changes_with_the_data_and_with_nothing_else(shard_folder, copy):
    assert Index.load(copy).fingerprint == Index.load(shard_folder).fingerprint
    index = Index.load(copy)
    table = index.table.copy()
    table["label"][3] += 1
    Index(folder=copy, shards=index.shards, table=table, classes=index.classes, build=index.build).save()
    assert Index.load(copy).fingerprint != Index.load(shard_folder).fingerprint


def change_json(folder, **fields):
    path = folder / "index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def lie(folder, field, by):
    """Let the index state ``field`` of every sample too high, consistently, and read one."""
    index = Index.load(folder)
    table = index.table.copy()
    table[field] += by
    Index(folder=folder, shards=index.shards, table=table, classes=(), build={}).save()
    ShardReader(Index.load(folder)).read(0)


def append_byte(path):
    path.write_bytes(path.read_bytes() + b"\0")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "shard-000002.tar").unlink(), r"shard-000002.tar: missing; the index lists 4 shards"),
        (lambda f: append_byte(f / "shard-000001.tar"), r"shard-000001.tar: \d+ bytes, the index says \d+"),
        (lambda f: (f / "index.json").write_text("{"), "index.json: damaged, not JSON"),
        (lambda f: (f / "index.json").write_text("[]"), "index.json: damaged, not a JSON object"),
        (lambda f: (f / "index.json").unlink(), "index.json: cannot be read"),
        (lambda f: change_json(f, format=99), "format 99 is newer"),
        (lambda f: change_json(f, shards=[{"name": "x"}]), "index.json: damaged"),
        (lambda f: (f / "index.npy").unlink(), "index.npy: cannot be read"),
        (lambda f: (f / "index.npy").write_bytes(b"\x93NUMPY garbage"), "index.npy: cannot be read"),
        (lambda f: np.save(f / "index.npy", np.zeros(3)), "index.npy: does not match index.json"),
        (lambda f: np.save(f / "index.npy", np.array([object()]), allow_pickle=True), "index.npy: cannot be read"),
        (lambda f: lie(f, "offset", 512), r"shard-000000.tar: the index does not match the tar at offset \d+"),
        (lambda f: lie(f, "size", 1), r"shard-000000.tar: the index does not match the tar at offset \d+"),
    ],
)
def test_damage_is_named_with_its_path(damage, message, copy):
    with pytest.raises(DataError, match=message):
        damage(copy)
        Index.load(copy)


@pytest.mark.parametrize(
    ("shape", "descr"),
    [((2**33,), ROW.descr), ((2**62, 2**62), ROW.descr), ((37,), "S1000000000"), ((37,), "O"), ((-1,), "<u4")],
)
def test_a_table_that_claims_any_size_costs_no_memory(shape, descr, copy):
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})
    (copy / "index.npy").write_bytes(file.getvalue() + bytes(1000))
    with bounded_memory(10 << 20), pytest.raises(DataError, match=r"index.npy: cannot be read"):
        Index.load(copy)


def load_all(folder: Path) -> bool:
    """Whether the index of ``folder`` loads; its samples are read then."""
    try:
        index = Index.load(folder)
    except DataError as error:
        # A shard's name may be an absolute path of few letters, such as "/".
        assert re.match(rf"({re.escape(str(folder))}.*|/etc/passwd|/.{{0,4}}): ", str(error), re.DOTALL)
        return False
    reader = ShardReader(index)
    for i in range(len(index)):
        try:
            reader.read(i)
        except (DataError, SampleError) as error:
            assert any(text in str(error) for text in ("does not match", "do not match their checksum", "cannot be read"))
    return True


@every_draw
def test_no_mutation_of_an_index_causes_another_error(draw, small_folder, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(small_folder, folder)
    files = {name: (small_folder / name).read_bytes() for name in ("index.json", "index.npy")}
    loaded = []

    @fuzz(draw, st.sampled_from(sorted(files)), st.booleans(), st.lists(MUTATION, max_size=3))
    def check(name, in_header, mutations):
        data = files[name]
        # numpy parses the header as Python's source, so half of the tables are damaged there.
        head = data[:128] if in_header and name == "index.npy" else data
        (folder / name).write_bytes(mutate(head, mutations) + data[len(head) :])
        with bounded_memory(10 << 20):
            loaded.append(load_all(folder))
        (folder / name).write_bytes(data)

    assert 0.02 < sum(loaded) / len(loaded) < 0.95


NUMBER = st.one_of(st.integers(-2, 3), st.integers(-(2**70), 2**70), st.sampled_from([2**31, 2**32, 2**62, 2**63, 10**400]))
TEXT = st.one_of(st.text(max_size=5), st.sampled_from(["../x", "/etc/passwd", "\0", "\ud800", "shard-000000.tar", "y" * 300]))
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBER, st.floats(), TEXT),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXT, inner, max_size=3)),
    max_leaves=5,
)
FIELDS = ("format", "samples", "table_xxh3", "classes", "build", "shards", "xxh3")


@every_draw
def test_no_lie_of_an_index_with_right_hashes_causes_another_error(draw, small_folder, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(small_folder, folder)
    index = Index.load(small_folder)
    shards = json.loads((small_folder / "index.json").read_text())["shards"]
    document = json.loads((small_folder / "index.json").read_text())
    loaded = []

    def random_row(field):
        return st.tuples(st.just(field), st.integers(0, len(index) - 1), NUMBER)

    cell = st.sampled_from(ROW.names).flatmap(random_row)
    value = st.one_of(JSON, TEXT, NUMBER)
    in_shard = st.tuples(st.integers(0, len(shards) - 1), st.sampled_from([*shards[0], "more"]), value)

    @fuzz(
        draw,
        st.dictionaries(st.sampled_from(FIELDS), value, max_size=1),
        st.lists(in_shard, max_size=1),
        st.lists(cell, max_size=2),
    )
    def check(fields, of_shards, cells):
        table = index.table.copy()
        for field, row, value in cells:
            bits = 8 * ROW[field].itemsize
            table[field][row] = np.array(value % 2**bits, f"u{bits // 8}").astype(ROW[field])
        np.save(folder / "index.npy", table)
        listed = [dict(shard) for shard in shards]
        for number, name, value in of_shards:
            listed[number][name] = value
        new = {
            **document,
            "shards": listed,
            "table_xxh3": xxhash.xxh3_64_hexdigest((folder / "index.npy").read_bytes()),
            **fields,
        }
        (folder / "index.json").write_text(json.dumps(new))
        write_json(folder)
        with bounded_memory(10 << 20):
            loaded.append(load_all(folder))

    assert 0.02 < sum(loaded) / len(loaded) < 0.95


def test_an_index_whose_tars_were_moved_says_where_it_looks_and_the_advice_finds_them(tar_folder, tmp_path):
    tars, index = tmp_path / "tars", tmp_path / "index"
    shutil.copytree(tar_folder, tars)
    before = index_shards(tars, index).fingerprint
    tars.rename(tmp_path / "elsewhere")
    with pytest.raises(DataError) as raised:
        Index.load(index)
    assert str(raised.value) == (
        f"{index}/../tars/part-0.tar: missing; the index lists 4 shards, this is number 0, and none of them is there: "
        f"{index}/index.json looks for its tars in {tars}; if they were moved to TARS, "
        f"`fastmae shards index TARS --out {index}` finds them"
    )
    index_shards(tmp_path / "elsewhere", index)
    assert Index.load(index).fingerprint == before  # so that a run resumes with it


def test_an_index_moved_away_from_the_tars_it_was_built_with_says_how_to_put_it_back(copy, tmp_path):
    before = Index.load(copy).fingerprint
    away = tmp_path / "away"
    away.mkdir()
    for name in ("index.json", "index.npy"):
        (copy / name).rename(away / name)
    text = f"{away}/index.json looks for its tars in {away}; move index.json and index.npy to where the tars are, and give that"
    with pytest.raises(DataError, match=re.escape(text)):
        Index.load(away)
    for name in ("index.json", "index.npy"):
        (away / name).rename(copy / name)
    assert Index.load(copy).fingerprint == before


def test_of_a_single_missing_tar_nothing_is_said_of_moving(copy):
    (copy / "shard-000002.tar").unlink()
    with pytest.raises(DataError, match=r"shard-000002\.tar: missing; .* this is number 2; restore it, or build the"):
        Index.load(copy)
