"""Metadata from somebody else: pickles that would run something, change something or lie are refused, and named."""

import builtins
import os
import pathlib
import pickle
import subprocess
from collections import OrderedDict
from pathlib import PosixPath

import pytest
import torch
from hypothesis import strategies as st
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from fastmae import DataError
from fastmae.train.checkpoint.metadata import METADATA, read_metadata
from fastmae.train.checkpoint.tensors import read_tensors, write_tensors
from tests.support.fuzz import MUTATION, bounded_memory, every_draw, fuzz, mutate


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A folder of two tensors."""
    folder = tmp_path_factory.mktemp("good") / "tensors"
    write_tensors(folder, {"a": torch.ones(3, 5), "b": torch.tensor(7)}, None)
    return folder


@pytest.fixture
def folder(good, tmp_path):
    """A copy of it whose metadata a test rewrites."""
    out = tmp_path / "tensors"
    out.mkdir()
    for path in good.iterdir():
        (out / path.name).write_bytes(path.read_bytes())
    return out


class Call:
    """Unpickled, it calls ``function``."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def check_refusal(folder, data, reason="cannot be read"):
    """``data`` as metadata is refused with a line that names its file."""
    (folder / METADATA).write_bytes(data)
    for read in (read_metadata, lambda f: read_tensors(f, {"a": torch.empty(3, 5)})):
        with pytest.raises(DataError, match=reason) as error:
            read(folder)
        assert str(folder / METADATA) in str(error.value) and "\n" not in str(error.value)


GADGETS = {
    "os.system": lambda mark: Call(os.system, f"touch {mark}"),
    "subprocess": lambda mark: Call(subprocess.Popen, ["touch", str(mark)]),
    "eval": lambda mark: Call(builtins.eval, f"__import__('pathlib').Path({str(mark)!r}).touch()"),
    "exec": lambda mark: Call(builtins.exec, f"import pathlib; pathlib.Path({str(mark)!r}).touch()"),
    "open": lambda mark: Call(builtins.open, str(mark), "w"),
    "getattr": lambda mark: Call(builtins.getattr, str(mark), "lower"),
    "an import": lambda mark: Call(__import__, "antigravity"),
    "torch.load": lambda mark: Call(torch.load, str(mark)),
    "torch.save": lambda mark: Call(torch.save, {}, str(mark)),
    "a method of an allowed class": lambda mark: Call(PosixPath.touch, PosixPath(mark)),
    "in a tensor's name": lambda mark: Metadata({Call(os.system, f"touch {mark}"): None}),
    "in a list of chunks": lambda mark: Metadata({"a": TensorStorageMetadata(None, None, [Call(os.system, f"touch {mark}")])}),
}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("name", GADGETS)
def test_what_would_run_something_is_refused_before_it_runs(name, protocol, folder, tmp_path):
    mark = tmp_path / "mark"
    data = pickle.dumps(GADGETS[name](mark), protocol)
    check_refusal(folder, data, r"nothing of it was run|opcode")
    assert not mark.exists()


def test_the_gadgets_do_run_where_nothing_stops_them(tmp_path):
    for number, name in enumerate(("os.system", "eval", "exec", "a method of an allowed class")):
        mark = tmp_path / str(number)
        pickle.loads(pickle.dumps(GADGETS[name](mark)))
        assert mark.exists(), name


def text(word):
    return b"X" + len(word).to_bytes(4, "little") + word.encode()


_GET_LAYOUT, _PATH = b"ctorch.serialization\n_get_layout\n", b"cpathlib\nPosixPath\n"
ABUSES = {  # opcodes by hand, of names that are all allowed
    "a class given a method": b"\x80\x02" + _PATH + b"N}" + text("evil") + _GET_LAYOUT + b"s\x86b.",
    "a class given a field": b"\x80\x02" + _PATH + b"}" + text("evil") + b"Nsb.",
    "a function's cache": b"\x80\x02" + _GET_LAYOUT + b"}" + text("cache") + b"}" + text("torch.strided") + b"Nssb.",
    "a function's defaults": b"\x80\x02" + _GET_LAYOUT + b"N}" + text("__defaults__") + text("x") + b"\x85s\x86b.",
    "a shared constant": b"\x80\x02ctorch.distributed.checkpoint.metadata\n_MEM_FORMAT_ENCODING\nK\x00\x85R}"
    + text("_value_") + b"K\x09sb.",
    "a data type": b"\x80\x02ctorch\nfloat32\n}" + text("evil") + b"Nsb.",
    "a function called with anything": b"\x80\x02" + _GET_LAYOUT + text("no layout") + b"\x85R.",
    "a class called with anything": b"\x80\x02ctorch\nSize\n" + text("no sizes") + b"\x85R.",
    "a class that is none": b"\x80\x02" + _GET_LAYOUT + b")\x81.",
    "an object of the pickler's": b"\x80\x02Poutside\n.",
    "an object from a registry": b"\x80\x02\x82\x01.",
    "a method by its dotted name": b"\x80\x04" + text("pathlib") + text("PosixPath.touch") + b"\x93.",
    "tuples in tuples, a key": b"\x80\x02})" + b"\x85" * 3_000_000 + b"Ns.",
    "tuples in tuples, by marks": b"\x80\x02}" + b"(" * 100_000 + b"t" * 100_000 + b"Ns.",
    "lists in lists": b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b".",
    "a text of four exabytes": b"\x80\x04\x8d" + (1 << 62).to_bytes(8, "little") + b"x.",
    "bytes of four exabytes": b"\x80\x05\x96" + (1 << 62).to_bytes(8, "little") + b"x.",
    "a frame of four exabytes": b"\x80\x04\x95" + (1 << 62).to_bytes(8, "little") + b"N.",
    "a place in the memo beyond all": b"\x80\x02Nr\xff\xff\xff\xff.",
    "nothing": b"",
    "no end": b"\x80\x04",
    "another object": pickle.dumps({"a": 1}),
}  # fmt: skip


@pytest.mark.parametrize("name", ABUSES)
def test_allowed_names_cannot_be_abused(name, folder):
    with bounded_memory(400 << 20):
        check_refusal(folder, ABUSES[name])
    assert not hasattr(pathlib.PosixPath, "evil") and not hasattr(torch.float32, "evil")
    assert torch.serialization._get_layout("torch.strided") is torch.strided
    assert torch.serialization._get_layout.__defaults__ is None
    assert _MEM_FORMAT_ENCODING.TORCH_CONTIGUOUS_FORMAT.value == 0


def lie(change):
    """The good folder's metadata, changed: ``change`` gets it, the entry of ``a``, and the place of ``a``."""

    def lying(good):
        metadata = pickle.loads((good / METADATA).read_bytes())
        index = next(i for i in metadata.storage_data if i.fqn == "a")
        return change(metadata, metadata.state_dict_metadata["a"], metadata.storage_data[index]) or metadata

    return lying


def chunk(offsets, sizes):
    return ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))


LIES = {
    "a path upwards": lie(lambda m, a, p: setattr(p, "relative_path", "../outside")),
    "a path through a folder": lie(lambda m, a, p: setattr(p, "relative_path", "sub/../../outside")),
    "an absolute path": lie(lambda m, a, p: setattr(p, "relative_path", "/etc/hostname")),
    "the folder itself": lie(lambda m, a, p: setattr(p, "relative_path", ".")),
    "the folder above": lie(lambda m, a, p: setattr(p, "relative_path", "..")),
    "no path": lie(lambda m, a, p: setattr(p, "relative_path", "")),
    "a path with a zero": lie(lambda m, a, p: setattr(p, "relative_path", "x\0y")),
    "a path as an object": lie(lambda m, a, p: setattr(p, "relative_path", PosixPath("__0_0.distcp"))),
    "a file that is not there": lie(lambda m, a, p: setattr(p, "relative_path", "__9_9.distcp")),
    "a place before the file": lie(lambda m, a, p: setattr(p, "offset", -1)),
    "a place as a word": lie(lambda m, a, p: setattr(p, "offset", "0")),
    "a compressed place": lie(lambda m, a, p: setattr(p, "transform_descriptors", ["stream.zstd/1"])),
    "no places": lie(lambda m, a, p: setattr(m, "storage_data", None)),
    "places of nothing": lie(lambda m, a, p: setattr(m, "storage_data", {})),
    "a place by a word": lie(lambda m, a, p: m.storage_data.update({"a": p})),
    "bytes, no tensor": lie(lambda m, a, p: m.state_dict_metadata.update(a=BytesStorageMetadata())),
    "a name that is none": lie(lambda m, a, p: m.state_dict_metadata.update({7: a})),
    "no names": lie(lambda m, a, p: setattr(m, "state_dict_metadata", [])),
    "no size": lie(lambda m, a, p: setattr(a, "size", None)),
    "a size as a tuple": lie(lambda m, a, p: setattr(a, "size", (3, 5))),
    "another size": lie(lambda m, a, p: setattr(a, "size", torch.Size((3, 6)))),
    "a huge size": lie(lambda m, a, p: setattr(a, "size", torch.Size((1 << 40, 5)))),
    "a size below zero": lie(lambda m, a, p: setattr(a, "size", torch.Size((-3, -5)))),
    "no properties": lie(lambda m, a, p: setattr(a, "properties", None)),
    "no dtype": lie(lambda m, a, p: setattr(a.properties, "dtype", "float32")),
    "no chunks": lie(lambda m, a, p: setattr(a, "chunks", [])),
    "a chunk that is none": lie(lambda m, a, p: setattr(a, "chunks", [None])),
    "a chunk too small": lie(lambda m, a, p: setattr(a, "chunks", [chunk((0, 0), (3, 4))])),
    "a chunk outside": lie(lambda m, a, p: setattr(a, "chunks", [chunk((0, 1), (3, 5))])),
    "a chunk of another rank": lie(lambda m, a, p: setattr(a, "chunks", [chunk((0,), (15,))])),
    "a chunk that lies nowhere": lie(lambda m, a, p: setattr(a, "chunks", [chunk((0, 0), (2, 5)), chunk((2, 0), (1, 5))])),
    "a dictionary": lie(lambda m, a, p: dict(vars(m))),
    "places in another dictionary": lie(lambda m, a, p: setattr(m, "storage_data", OrderedDict(m.storage_data))),
}  # fmt: skip


@pytest.mark.parametrize("name", LIES)
def test_metadata_that_does_not_describe_full_tensors_beside_it_is_refused(name, folder, good):
    (folder.parent / "outside").write_bytes((good / "__0_0.distcp").read_bytes())
    check_refusal(folder, pickle.dumps(LIES[name](good)), "cannot be read, ")


def test_a_pipe_in_place_of_a_file_does_not_hold_the_reader(folder, good):
    os.mkfifo(folder / "pipe")
    check_refusal(folder, pickle.dumps(lie(lambda m, a, p: setattr(p, "relative_path", "pipe"))(good)), "no file beside it")


def test_what_the_writer_says_of_itself_is_not_needed(folder, good):
    metadata = lie(lambda m, a, p: None)(good)
    metadata.storage_meta = metadata.planner_data = metadata.version = None
    (folder / METADATA).write_bytes(pickle.dumps(metadata))
    a = torch.zeros(3, 5)
    read_tensors(folder, {"a": a})
    assert torch.equal(a, torch.ones(3, 5))


@every_draw
def test_damaged_metadata_is_refused_or_says_the_same_kind_of_thing(draw, good, tmp_path_factory):
    data = (good / METADATA).read_bytes()
    folder = tmp_path_factory.mktemp("fuzzed")
    for path in good.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())

    @fuzz(draw, st.lists(MUTATION, min_size=1, max_size=3))
    def try_one(mutations):
        (folder / METADATA).write_bytes(mutate(data, mutations))
        try:
            found = read_metadata(folder)
        except DataError as error:
            assert str(folder / METADATA) in str(error)
        else:
            assert type(found) is Metadata
            assert all(type(place) is _StorageInfo for place in found.storage_data.values())
            assert all(type(index) is MetadataIndex for index in found.storage_data)


@every_draw
def test_random_bytes_are_refused(draw, tmp_path):
    @fuzz(draw, st.binary(max_size=200))
    def try_one(data):
        (tmp_path / METADATA).write_bytes(data)
        with pytest.raises(DataError, match="metadata: cannot be read, "):
            read_metadata(tmp_path)
