"""The description of a folder of tensors, ``.metadata``: a pickle of torch.distributed.checkpoint's, read as plain data.

A pickle can run anything. This one may use only the opcodes and name only the few classes that describe tensors, may fill
only records that it has made itself (filling a class or a function would change it for the rest of the process), and
nests tuples no deeper than such descriptions do (hashing a deep one overflows the stack). Its contents are then checked, down
to the types.
"""

import io
import math
import pickle
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path, PurePath

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from fastmae.errors import DataError

METADATA = ".metadata"
_ALLOWED = {
    "torch": ("Size", "float16", "bfloat16", "float32", "float64", "int32", "int64", "uint8", "bool"),
    "torch.serialization": ("_get_layout",),
    "torch.distributed.checkpoint.metadata": ("ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
                                              "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING"),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "pathlib": ("PosixPath", "PurePosixPath"),
    "collections": ("OrderedDict",),
}  # fmt: skip
_RECORDS = (ChunkStorageMetadata, Metadata, MetadataIndex, StorageMeta, TensorProperties, TensorStorageMetadata, _StorageInfo)
_TUPLES = ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3")
_OPCODES = ("APPEND", "APPENDS", "BINGET", "BININT", "BININT1", "BININT2", "BINPUT", "BINUNICODE", "EMPTY_DICT", "EMPTY_LIST",
            "EMPTY_TUPLE", "FRAME", "GLOBAL", "LONG1", "LONG_BINGET", "LONG_BINPUT", "MARK", "MEMOIZE", "NEWFALSE", "NEWOBJ",
            "NEWTRUE", "NONE", "PROTO", "REDUCE", "SETITEM", "SETITEMS", "SHORT_BINUNICODE", "STACK_GLOBAL",
            "STOP")  # fmt: skip


def read_metadata(folder: Path) -> Metadata:
    """What the folder ``folder`` holds. Raises DataError naming the file if it describes anything but tensors beside it."""
    path = folder / METADATA
    try:
        metadata = _Unpickler(io.BytesIO(path.read_bytes())).load()
        _check(metadata, folder)
    except Exception as error:  # damaged pickles raise anything
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise DataError(f"{path}: cannot be read, {reason}") from error
    metadata.planner_data, metadata.storage_meta = None, StorageMeta()  # of the writer, not needed to read
    return metadata


class _Unpickler(pickle._Unpickler):
    """The one in Python: the one in C cannot refuse opcodes, nor restrict what a pickle may fill."""

    def find_class(self, module: str, name: str) -> object:
        if name not in _ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which describes no tensor; nothing of it was run")
        return getattr(import_module(module), name)


def _load_build(unpickler: _Unpickler) -> None:
    if type(unpickler.stack[-2]) not in _RECORDS:
        raise pickle.UnpicklingError(f"it would change {unpickler.stack[-2]!r:.80}; nothing of it was run")
    unpickler.load_build()


def _load_flat(load: Callable[[_Unpickler], None], unpickler: _Unpickler) -> None:
    load(unpickler)
    inner = [item for item in unpickler.stack[-1] if isinstance(item, tuple)]
    if any(isinstance(item, tuple) for items in inner for item in items):
        raise pickle.UnpicklingError("it nests tuples, which describes no tensor")


def _refuse(code: int, unpickler: _Unpickler) -> None:
    raise pickle.UnpicklingError(f"it uses opcode {bytes([code])!r}, which describes no tensor; nothing of it was run")


def _opcodes() -> dict[int, Callable[[_Unpickler], None]]:
    """What each opcode does."""
    known = {name: getattr(pickle, name)[0] for name in (*_OPCODES, *_TUPLES)}
    load = pickle._Unpickler.dispatch
    return (
        {code: partial(_refuse, code) for code in load}
        | {known[name]: load[known[name]] for name in _OPCODES}
        | {known[name]: partial(_load_flat, load[known[name]]) for name in _TUPLES}
        | {pickle.BUILD[0]: _load_build}
    )


_Unpickler.dispatch = _opcodes()


def _check(metadata: object, folder: Path) -> None:
    """Raise ValueError unless ``metadata`` describes complete tensors only, in files of ``folder``."""
    if type(metadata) is not Metadata:
        raise ValueError("it is not DCP metadata")
    stored = _checked(metadata.storage_data, dict)
    for index, info in stored.items():
        _checked(_checked(index, MetadataIndex).fqn, str)
        _check_storage(_checked(info, _StorageInfo))
    for name in {info.relative_path for info in stored.values()}:
        if PurePath(name).parts != (name,) or name == ".." or not (folder / name).is_file():
            raise ValueError(f"it names {name}, which is no file beside it")
    for name, item in _checked(metadata.state_dict_metadata, dict).items():
        if type(item) is not TensorStorageMetadata:
            raise ValueError(f"{_checked(name, str)} is no tensor")
        _check_tensor(name, item, stored)


def _check_storage(info: _StorageInfo) -> None:
    _checked(info.relative_path, str)
    if min(_checked(info.offset, int), _checked(info.length, int)) < 0 or info.transform_descriptors is not None:
        raise ValueError(f"{info} is not where a tensor is stored")


def _check_tensor(name: str, item: TensorStorageMetadata, stored: dict[MetadataIndex, _StorageInfo]) -> None:
    _checked(_checked(item.properties, TensorProperties).dtype, torch.dtype)
    for chunk in _checked(item.chunks, list):
        offsets, sizes = _checked(chunk.offsets, torch.Size), _checked(chunk.sizes, torch.Size)
        inside = (0 <= at <= at + size <= full for at, size, full in zip(offsets, sizes, item.size, strict=True))
        if not all(inside) or MetadataIndex(name, offsets) not in stored:
            raise ValueError(f"a shard of {name} lies outside it, or is not stored")
    if sum(math.prod(chunk.sizes) for chunk in item.chunks) != math.prod(_checked(item.size, torch.Size)):
        raise ValueError(f"the shards of {name} do not add up to the full tensor")


def _checked(value: object, kind: type) -> object:
    """``value``, if it is of ``kind`` itself."""
    if type(value) is not kind:
        raise ValueError(f"{value!r:.40} stands where a {kind.__name__} belongs")
    return value
