"""Tensors of all ranks in one folder, through torch.distributed.checkpoint (DCP): sharded or full, read by any world size.

DCP's own reader unpickles whatever it finds. Here its metadata is read as plain data (``metadata.py``), and nothing but
tensors is written or read (each by ``weights_only``), so that a folder from an untrusted source can only be refused.
"""

import pickle
import warnings
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.storage import WriteResult

from fastmae.errors import DataError
from fastmae.train.checkpoint.metadata import read_metadata


def write_tensors(folder: Path, tensors: dict[str, Tensor], group: dist.ProcessGroup | None) -> Metadata:
    """Write ``tensors``, on the CPU, flushed to the disk; every rank of ``group`` gives its own, or its shard of one.

    Returns DCP's metadata of the tensors of all ranks. Raises OSError, on every rank, if any rank could not write.
    """
    _quiet()
    # Nothing is to be copied ahead: the tensors are on the CPU, and the copier would take hold of a GPU, the first one.
    writer = _Writer(folder, per_thread_copy_ahead=0)
    try:
        return dcp.save(tensors, storage_writer=writer, process_group=group, no_dist=group is None)
    except CheckpointException as error:
        rank, (reason, _) = next(iter(error.failures.items()))
        # torch.save hides a full disk behind a RuntimeError of its own; the hidden one is lost on the way from another rank.
        cause = reason.__context__ if isinstance(reason.__context__, OSError) else reason
        if isinstance(cause, OSError):
            raise OSError(cause.errno, f"{cause.strerror}, on rank {rank}", str(folder)) from error
        if isinstance(reason, RuntimeError):
            raise OSError(None, f"{_first_line(reason)}, on rank {rank}", str(folder)) from error
        raise reason from error


def read_tensors(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Fill ``tensors``, or this rank's shards of them, in place; each rank reads for itself.

    Raises DataError if the folder is damaged, holds anything but tensors, lacks one of them, or has another shape or dtype.
    """
    _fill(folder, read_metadata(folder), tensors)


def read_back(folder: Path, metadata: Metadata, names: Iterable[str]) -> dict[str, Tensor]:
    """The full tensors ``names``, on the CPU, of a folder just written. Raises DataError if it cannot be read.

    ``metadata``: what ``write_tensors`` gave. Reading it from its file, as plain data, would take longer than the rest.
    """
    found = {name: metadata.state_dict_metadata[name] for name in names}
    tensors = {name: torch.empty(m.size, dtype=m.properties.dtype) for name, m in found.items()}
    _fill(folder, metadata, tensors)
    return tensors


def describe_tensors(folder: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Full shape and dtype of each tensor in ``folder``. Raises DataError if its metadata cannot be read."""
    return _describe(read_metadata(folder))


class _Writer(FileSystemWriter):
    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        super().finish(metadata, results)
        # Where each tensor lies; torch 2.11 writes it to the file but does not return it.
        metadata.storage_data = {result.index: result.storage_data for theirs in results for result in theirs}


class _Reader(FileSystemReader):
    def __init__(self, folder: Path, metadata: Metadata):
        super().__init__(folder)
        self.metadata = metadata

    def read_metadata(self, *arguments, **options) -> Metadata:
        return self.metadata


def _describe(metadata: Metadata) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (m.size, m.properties.dtype) for name, m in metadata.state_dict_metadata.items()}


def _fill(folder: Path, metadata: Metadata, tensors: dict[str, Tensor]) -> None:
    found = _describe(metadata)
    for name, tensor in tensors.items():
        if name not in found:
            raise DataError(f"{folder}: has no tensor {name}")
        if found[name] != (tensor.size(), tensor.dtype):
            theirs, ours = (f"{dtype} {tuple(size)}" for size, dtype in (found[name], (tensor.size(), tensor.dtype)))
            raise DataError(f"{folder}: {name} is {theirs} in the checkpoint and {ours} in this run")
    _quiet()
    try:
        dcp.load(tensors, storage_reader=_Reader(folder, metadata), no_dist=True)
    except (CheckpointException, RuntimeError, ValueError, OSError, EOFError, pickle.UnpicklingError) as error:
        raise DataError(f"{folder}: cannot be read, {_first_line(error)}") from error


def _quiet() -> None:
    """DCP warns that a single process saves or loads, which is intended."""
    warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized", UserWarning)


def _first_line(error: BaseException) -> str:
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return str(error).partition("\n")[0] or type(error).__name__
