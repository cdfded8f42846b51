"""Processes of one run: who am I, how many are we, and how gradients are shared. The model knows nothing of it."""

import os
import warnings
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fastmae.errors import InputError


@dataclass(frozen=True)
class World:
    """This process's place among the processes of a run."""

    rank: int
    size: int
    device: torch.device
    control: dist.ProcessGroup | None = None
    """A group on the CPU for words between the processes, which so never wait for a GPU; None in a run of one."""

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and talks to the console."""
        return self.rank == 0

    def mean(self, x: torch.Tensor) -> torch.Tensor:
        """The mean of ``x`` over all processes."""
        if self.size == 1:
            return x
        total = x.clone()
        dist.all_reduce(total)
        return total / self.size

    def any(self, *flags: bool) -> list[bool]:
        """For each of ``flags``, whether it is true on any process."""
        if self.size == 1:
            return list(flags)
        votes = torch.tensor([float(flag) for flag in flags])
        dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=self.control)
        return [bool(vote) for vote in votes.tolist()]

    def gather(self, lines: list[str]) -> list[str]:
        """The ``lines`` of all processes, on every process."""
        if self.size == 1:
            return lines
        everyone: list[list[str] | None] = [None] * self.size
        dist.all_gather_object(everyone, lines, group=self.control)
        return [line for theirs in everyone for line in theirs]

    def from_main(self, text: str | None) -> str | None:
        """The main process's ``text``, on every process."""
        if self.size == 1:
            return text
        box = [text]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def barrier(self) -> None:
        """Wait for all processes."""
        self.any(False)  # gloo's own barrier would put a tensor on the GPU


def join_world(device: str) -> World:
    """Read torchrun's environment and join its group: NCCL on GPUs, gloo on the CPU. ``device``: auto, cpu or cuda.

    Raises InputError if a GPU is asked for and none is there.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise InputError(f"device must be auto, cpu or cuda, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("device cuda was asked for, but torch sees no CUDA device; `fastmae doctor` tells more")
    on_gpu = torch.cuda.is_available() if device == "auto" else device == "cuda"
    rank, size, local = (int(os.environ.get(name, default)) for name, default in
                         (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))  # fmt: skip
    place = torch.device("cuda", local) if on_gpu else torch.device("cpu")
    if on_gpu:
        if local >= torch.cuda.device_count():
            raise InputError(
                f"process {local} of this machine has no GPU: it has {torch.cuda.device_count()}; start fewer processes"
            )
        torch.cuda.set_device(place)
    if size > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if on_gpu else "gloo", device_id=place if on_gpu else None)
    return World(rank, size, place, dist.new_group(backend="gloo") if size > 1 else None)


def leave_world() -> None:
    """Leave the group, if one was joined."""
    if dist.is_initialized():
        dist.destroy_process_group()


def share_gradients(module: nn.Module, world: World) -> nn.Module:
    """``module`` with its gradients averaged over all processes: DDP, or itself in a run of one."""
    if world.size == 1:
        return module
    ids = [world.device.index] if world.device.type == "cuda" else None
    with warnings.catch_warnings():
        # Buffers are constants, so none is sent. torch 2.13 has a new name for that, which 2.11 does not know.
        warnings.simplefilter("ignore", FutureWarning)
        return DistributedDataParallel(module, device_ids=ids, gradient_as_bucket_view=True, broadcast_buffers=False)
