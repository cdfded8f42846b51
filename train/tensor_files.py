"""Tensors of all processes in one folder, through torch.distributed.checkpoint (DCP): cut or whole, read by any number of them.

DCP's own reader unpickles its ``.metadata``, which can run anything, and objects that are no tensors. Here the metadata may
name only the few classes that describe tensors, and nothing but tensors is written or read (each by ``weights_only``), so
that a folder from somebody else can be refused but does nothing.
"""

import pickle
import warnings
from importlib import import_module
from pathlib import Path, PurePath

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

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


def write_tensors(folder: Path, tensors: dict[str, Tensor], group: dist.ProcessGroup | None) -> None:
    """Write ``tensors``, on the CPU, flushed to the disk; every process of ``group`` gives its own, or its part of one.

    Raises OSError if any process could not write, for each of them.
    """
    _quiet()
    try:
        dcp.save(tensors, storage_writer=FileSystemWriter(folder), process_group=group, no_dist=group is None)
    except CheckpointException as error:
        rank, (reason, _) = next(iter(error.failures.items()))
        if isinstance(reason, OSError):
            raise OSError(reason.errno, f"{reason.strerror}, on rank {rank}", str(folder)) from error
        raise


def read_tensors(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Fill ``tensors``, or this process's parts of them, in place; each process reads for itself.

    Raises DataError if the folder is damaged, holds anything but tensors, lacks one of them, or has it in another shape.
    """
    reader = _Reader(folder)
    found = reader.read_metadata().state_dict_metadata
    for name, tensor in tensors.items():
        if name not in found:
            raise DataError(f"{folder}: holds no {name}")
        if found[name].size != tensor.size():
            raise DataError(f"{folder}: {name} is {tuple(found[name].size)} there and {tuple(tensor.size())} here")
    _quiet()
    try:
        dcp.load(tensors, storage_reader=reader, no_dist=True)
    except (CheckpointException, RuntimeError, ValueError, OSError, EOFError, pickle.UnpicklingError) as error:
        raise DataError(f"{folder}: cannot be read, {_first_reason(error)}") from error


def describe_tensors(folder: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and dtype of each whole tensor in ``folder``. Raises DataError if it cannot be told."""
    return {name: (m.size, m.properties.dtype) for name, m in _Reader(folder).read_metadata().state_dict_metadata.items()}


class _Reader(FileSystemReader):
    def read_metadata(self, *arguments, **options) -> Metadata:
        path = Path(self.path) / METADATA
        try:
            with path.open("rb") as file:
                metadata = _Unpickler(file).load()
            _check(metadata)
        except Exception as error:  # damaged pickles raise anything; none of it is ours to tell apart
            raise DataError(f"{path}: cannot be read, {_first_reason(error)}") from error
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> object:
        if name not in _ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which describes no tensor; nothing of it was run")
        return getattr(import_module(module), name)


def _check(metadata: object) -> None:
    """Raise ValueError unless ``metadata`` describes tensors alone, in files beside it."""
    if not isinstance(metadata, Metadata):
        raise ValueError("it is no metadata")
    for name, item in metadata.state_dict_metadata.items():
        if not isinstance(item, TensorStorageMetadata):
            raise ValueError(f"{name} is no tensor")
    for place in metadata.storage_data.values():
        path = PurePath(place.relative_path)
        if len(path.parts) != 1 or path.name in ("", ".."):
            raise ValueError(f"it names {path}, outside its folder")


def _quiet() -> None:
    """DCP warns that one process works alone, which is meant."""
    warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized", UserWarning)


def _first_reason(error: BaseException) -> str:
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return str(error).partition("\n")[0] or type(error).__name__
