"""Folders of tensors: every bit comes back, what does not fit or would run something is refused, full disks are reported."""

import errno
import os
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import strategies as st
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

from fastmae import DataError
from fastmae.train.checkpoint import tensors as tensor_files
from fastmae.train.checkpoint.metadata import METADATA
from fastmae.train.checkpoint.tensors import describe_tensors, read_tensors, write_tensors
from tests.support.fuzz import MUTATION, every_draw, fuzz, mutate

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int32, torch.int64, torch.uint8, torch.bool]
SHAPES = [(), (0,), (1,), (3, 0, 2), (7, 5), (2, 3, 1, 5)]


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def random_bits(shape, dtype):
    if dtype is torch.bool:
        return torch.rand(shape) < 0.5
    size = torch.empty((), dtype=dtype).element_size()
    return torch.randint(0, 256, (*shape, size), dtype=torch.uint8).view(dtype).reshape(shape)  # NaNs too


def test_every_bit_of_every_dtype_and_shape_comes_back(tmp_path):
    tensors = {f"{dtype}/{shape}": random_bits(shape, dtype) for dtype in DTYPES for shape in SHAPES}
    tensors["turned"] = random_bits((5, 7), torch.float32).T
    tensors["a part"] = random_bits((9, 9), torch.float32)[2:5, ::2]
    write_tensors(tmp_path, tensors, None)
    assert describe_tensors(tmp_path) == {name: (t.shape, t.dtype) for name, t in tensors.items()}
    back = {name: torch.zeros(t.shape, dtype=t.dtype) for name, t in tensors.items()}
    read_tensors(tmp_path, back)
    assert [name for name, t in tensors.items() if not torch.equal(bits(t), bits(back[name]))] == []


@pytest.fixture
def folder(tmp_path):
    """A folder of two tensors."""
    write_tensors(tmp_path / "tensors", {"a": torch.ones(3, 5), "b": torch.zeros(())}, None)
    return tmp_path / "tensors"


@pytest.mark.parametrize(
    ("name", "tensor", "reason"),
    [
        ("c", torch.empty(3), "has no tensor c"),
        ("a", torch.empty(5, 3), r"a is torch.float32 \(3, 5\) in the checkpoint and torch.float32 \(5, 3\) in this run"),
        (
            "a",
            torch.empty(3, 5, dtype=torch.float64),
            r"a is torch.float32 \(3, 5\) in the checkpoint and torch.float64 \(3, 5\) in this run",
        ),
        ("b", torch.empty(1), r"b is torch.float32 \(\) in the checkpoint and torch.float32 \(1,\) in this run"),
    ],
)
def test_what_is_not_there_or_does_not_fit_is_named(name, tensor, reason, folder):
    with pytest.raises(DataError, match=f"{folder}: {reason}"):
        read_tensors(folder, {name: tensor})


class Bomb:
    """Leaves a mark where it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def payload(folder, data):
    """Put ``data`` where the tensors are, and let the metadata say that it is ``a``."""
    (folder / "__0_0.distcp").write_bytes(data)
    metadata = pickle.loads((folder / METADATA).read_bytes())
    for place in metadata.storage_data.values():
        place.offset, place.length = 0, len(data)
    (folder / METADATA).write_bytes(pickle.dumps(metadata))


@pytest.mark.parametrize("how", ["pickle", "torch.save", "old torch.save", "protocol 0"])
def test_a_payload_that_would_run_something_is_refused_before_it_runs(how, folder, tmp_path):
    mark = tmp_path / "mark"
    if how in ("pickle", "protocol 0"):
        payload(folder, pickle.dumps(Bomb(mark), 0 if how == "protocol 0" else None))
    else:
        torch.save([torch.ones(3, 5), Bomb(mark)], tmp_path / "x", _use_new_zipfile_serialization=how == "torch.save")
        payload(folder, (tmp_path / "x").read_bytes())
    with pytest.raises(DataError, match=f"{folder}: cannot be read, ") as refused:
        read_tensors(folder, {"a": torch.empty(3, 5)})
    assert not mark.exists() and "\n" not in str(refused.value)
    torch.load(tmp_path / "x", weights_only=False) if "torch" in how else pickle.loads((folder / "__0_0.distcp").read_bytes())
    assert mark.exists()  # it would have


@pytest.mark.parametrize("thing", [{"a": 1}, "text", torch.ones(4, 4), torch.nn.Parameter(torch.ones(5, 3)), None])
def test_a_payload_that_is_another_thing_is_refused(thing, folder, tmp_path):
    torch.save(thing, tmp_path / "x")
    payload(folder, (tmp_path / "x").read_bytes())
    with pytest.raises(DataError, match=f"{folder}: cannot be read, "):
        read_tensors(folder, {"a": torch.empty(3, 5)})


def test_parts_of_a_tensor_are_put_together(tmp_path):
    """As several processes write them."""
    whole = torch.randn(4, 3)
    write_tensors(tmp_path, {"a": whole[:2].clone(), "b": whole[2:].clone()}, None)
    metadata = pickle.loads((tmp_path / METADATA).read_bytes())
    item, places = metadata.state_dict_metadata["a"], {i.fqn: place for i, place in metadata.storage_data.items()}
    item.size = whole.shape
    item.chunks = [ChunkStorageMetadata(torch.Size((row, 0)), torch.Size((2, 3))) for row in (0, 2)]
    metadata.state_dict_metadata = {"a": item}
    metadata.storage_data = {MetadataIndex("a", (0, 0)): places["a"], MetadataIndex("a", (2, 0)): places["b"]}
    (tmp_path / METADATA).write_bytes(pickle.dumps(metadata))
    back = torch.zeros(4, 3)
    read_tensors(tmp_path, {"a": back})
    assert torch.equal(back, whole)


@every_draw
def test_no_damage_of_a_payload_causes_another_error(draw, folder):
    data = (folder / "__0_0.distcp").read_bytes()
    read = []

    @fuzz(draw, st.lists(MUTATION, min_size=1, max_size=2), examples=100)
    def try_one(mutations):
        (folder / "__0_0.distcp").write_bytes(mutate(data, mutations))
        try:
            read_tensors(folder, {"a": torch.empty(3, 5), "b": torch.empty(())})
        except DataError as error:
            assert str(folder) in str(error)
        read.append(1)

    assert len(read) >= 100


@pytest.mark.parametrize("hidden", [True, False], ids=["behind torch's RuntimeError", "as it is"])
def test_a_full_disk_is_an_oserror_that_names_the_folder(hidden, tmp_path, monkeypatch):
    def full(*_):
        error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if not hidden:
            raise error
        try:
            raise error
        finally:
            raise RuntimeError("unexpected pos 704 vs 598")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left on device, on rank 0") as failed:
        write_tensors(tmp_path / "tensors", {"a": torch.ones(3)}, None)
    assert (failed.value.errno, failed.value.filename) == (errno.ENOSPC, str(tmp_path / "tensors"))


def test_a_fault_of_ours_is_raised_as_itself(tmp_path, monkeypatch):
    """torch hides it in an exception that no ``except Exception`` sees."""
    assert not issubclass(CheckpointException, Exception)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", lambda *_: [][0])
        with pytest.raises(IndexError):
            write_tensors(tmp_path / "tensors", {"a": torch.ones(3)}, None)

    def broken(*_):
        raise RuntimeError("enforce fail\nin some file")

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(OSError, match="enforce fail, on rank 0"):
        write_tensors(tmp_path / "tensors", {"a": torch.ones(3)}, None)
    assert tensor_files._first_line(ValueError()) == "ValueError"
