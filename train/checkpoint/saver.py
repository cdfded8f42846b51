"""Writes checkpoints, asynchronously if asked: training waits only while its tensors are copied to the host.

The ranks write together, each its share; rank 0 prepares the folder, and completes it: weights for exchange, state, manifest,
and last the name that makes it a checkpoint. An error before that leaves the older checkpoints as they were.
"""

import shutil
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from threading import Thread

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.tensor import DTensor

from fastmae.errors import CheckpointError
from fastmae.files import sync
from fastmae.model.config import ModelConfig
from fastmae.model.weights import Weights, save_weights
from fastmae.train.checkpoint.disk_space import bytes_of_checkpoint
from fastmae.train.checkpoint.format import (
    MODEL,
    STATE,
    TENSORS,
    checkpoint_folder,
    remove_leftovers,
    remove_old,
    write_json,
    write_manifest,
)
from fastmae.train.checkpoint.metadata import METADATA
from fastmae.train.checkpoint.state import share_out
from fastmae.train.checkpoint.tensors import read_back, write_tensors
from fastmae.train.distributed.world import World

MAX_FAILED = 3  # consecutive failed saves that stop the run


@dataclass(frozen=True)
class Saved:
    """How a save ended."""

    step: int
    folder: Path
    seconds: float
    bytes: int
    error: str | None
    """Why nothing was saved; None if it was."""


class Saver:
    """Saves the state of a run, one checkpoint at a time. Every rank calls the same methods at the same steps."""

    def __init__(self, out: Path, config: ModelConfig, world: World, *, keep: int, keep_every: int | None, asynchronous: bool):
        self.out, self.config, self.world = out, config, world
        self.keep, self.keep_every, self.asynchronous = keep, keep_every, asynchronous
        # Pinned memory on the host is taken once: taking it costs more than the copy.
        self._stager = BlockingAsyncStager(cache_staged_state_dict=world.device.type == "cuda")
        self._thread: Thread | None = None
        self._ended: deque[Saved] = deque()
        self._fault: BaseException | None = None
        self._failed = 0
        self.error: str | None = None
        """Why the last save failed; None if it did not. Read it after ``wait``."""
        self.newest: Path | None = None
        """The last checkpoint that was completed; read it after ``wait``."""

    def begin(self, step: int, tensors: dict[str, Tensor], own: dict[str, Tensor], state: dict) -> None:
        """Save ``tensors`` of the run, ``own`` ones of this rank, and ``state``, plain JSON, as the checkpoint of ``step``.

        Returns once the tensors may change again. Waits for the previous save. Raises CheckpointError after
        ``MAX_FAILED`` consecutive failures.
        """
        self.wait()
        needed = bytes_of_checkpoint(tensors)
        staged = self._stager.stage({**share_out(tensors, self.world), **own})
        self._thread = Thread(target=self._save, args=(step, staged, needed, state), name="checkpoint", daemon=True)
        self._thread.start()
        if not self.asynchronous:
            self.wait()

    def wait(self) -> None:
        """Wait until nothing is being saved. Raises CheckpointError as ``begin``."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._fault is not None:
            raise self._fault
        if self._failed >= MAX_FAILED:
            raise CheckpointError(f"{self._failed} consecutive checkpoints could not be written, the last: {self.error}")

    def ended(self) -> list[Saved]:
        """The saves that have ended since the last call."""
        return [self._ended.popleft() for _ in range(len(self._ended))]

    def _save(self, step: int, tensors: dict[str, Tensor], needed: int, state: dict) -> None:
        began = time.perf_counter()
        folder = checkpoint_folder(self.out, step)
        partial = self.out / f".{folder.name}.partial"
        written, error = 0, None
        if self.world.device.type == "cuda":
            torch.cuda.set_device(self.world.device)  # a new thread would use the first one
        try:
            self._on_rank_0(lambda: self._prepare(partial, needed))
            metadata = write_tensors(partial / TENSORS, tensors, self.world.background)
            written = int(self._on_rank_0(lambda: self._complete(partial, folder, state, tensors, metadata)))
        except (OSError, RuntimeError) as failure:
            error = self._reason(failure, needed)
            if self.world.is_main:
                shutil.rmtree(partial, ignore_errors=True)
        except BaseException as fault:  # a fault of ours: raised where the run waits for the save
            self._fault = fault
            return
        self.error, self._failed = error, self._failed + 1 if error else 0
        self.newest = self.newest if error else folder
        self._ended.append(Saved(step, folder, time.perf_counter() - began, written, error))

    def _on_rank_0(self, work: Callable[[], object]) -> str:
        """Call ``work`` on rank 0; return its result, or raise OSError if it failed, on every rank."""
        box: list[str | None] = [None, None]
        if self.world.is_main:
            try:
                box[0] = str(work())
            except Exception as error:  # of any kind: the other ranks wait for the result
                box[1] = self._named(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
        if self.world.size > 1:
            dist.broadcast_object_list(box, src=0, group=self.world.background)
        if box[1] is not None:
            raise OSError(box[1])
        return box[0]

    def _prepare(self, partial: Path, needed: int) -> None:
        remove_leftovers(self.out)
        free = shutil.disk_usage(self.out).free
        if free < needed:
            raise OSError(None, "no space left on the disk", str(self.out))
        (partial / TENSORS).mkdir(parents=True)

    def _complete(self, partial: Path, folder: Path, state: dict, tensors: dict[str, Tensor], metadata: Metadata) -> int:
        """Make a checkpoint of the ``partial`` one whose tensors are written; return its bytes."""
        names = {name for name in metadata.state_dict_metadata if name.startswith("model/")}
        model = {name: tensor for name, tensor in tensors.items() if name in names and not isinstance(tensor, DTensor)}
        # The others' are read from what they wrote: no rank needs memory for the full model on its GPU.
        model |= read_back(partial / TENSORS, metadata, names - model.keys())
        weights = {name.removeprefix("model/"): tensor for name, tensor in model.items()}
        save_weights(Weights(partial / MODEL, weights, self.config, knows_target=True), partial / MODEL)
        write_json(partial / STATE, state)
        written = write_manifest(partial)
        for path in (partial / TENSORS / METADATA, partial / TENSORS, partial):  # DCP flushes tensors alone
            sync(path)
        shutil.rmtree(folder, ignore_errors=True)  # a damaged one of the same step
        partial.rename(folder)
        sync(self.out)
        remove_old(self.out, state["step"], self.keep, self.keep_every)
        return written

    def _reason(self, error: Exception, needed: int) -> str:
        text = self._named(error) if isinstance(error, OSError) and error.filename else str(error)
        try:
            free = f"{shutil.disk_usage(self.out).free} bytes are free in {self.out}"
        except OSError as gone:
            free = f"{self.out} cannot be read, {gone.strerror}"
        quota = ", over the disk quota (quota -s)" if "quota" in text.lower() else ""
        return f"{text.partition(chr(10))[0]}; it needs {needed} bytes, {free}{quota}"

    def _named(self, error: OSError) -> str:
        return f"{error.filename or self.out}: {error.strerror or error}"
