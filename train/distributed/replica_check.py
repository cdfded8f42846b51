"""Whether all processes hold the same weights: replicas that drift apart would continue unnoticed.

A checksum of each parameter's bits, weighted by position so that swapped values change it too, is compared across processes.
Causes seen in the field are faulty memory and links; Dixit et al. 2021 (arXiv 2102.11245) on silent data corruption.
"""

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fastmae.errors import DivergedError
from fastmae.train.distributed.world import World


def check_replicas(model: nn.Module, world: World, step: int) -> None:
    """Raise DivergedError, on every process, naming rank and parameter, unless all unsharded parameters are the same bits.

    Waits for the device. Sharded parameters have no replica to compare with, and are skipped.
    """
    named = [(name, p) for name, p in model.named_parameters() if not isinstance(p, DTensor)]
    if world.size == 1 or not named:
        return
    everyone = world.gather([torch.stack([checksum(p) for _, p in named]).tolist()])
    for rank, theirs in enumerate(everyone):
        different = [name for (name, _), a, b in zip(named, everyone[0], theirs, strict=True) if a != b]
        if different:
            suspect = "machine" if world.local_size < world.size else "GPU" if world.device.type == "cuda" else "memory"
            raise DivergedError(
                f"the weights of rank {rank} are not those of rank 0 after step {step}: {different[0]} and "
                f"{len(different) - 1} others differ; resume from a checkpoint, once that rank's {suspect} is replaced"
            )


@torch.no_grad()
def checksum(x: Tensor) -> Tensor:
    """An int64 scalar that a changed bit of ``x`` changes."""
    integers = x.detach().contiguous().view(-1).view(torch.uint8).view(torch.int32 if x.element_size() >= 4 else torch.int16)
    positions = torch.arange(1, len(integers) + 1, device=x.device)
    return (integers.to(torch.int64) * (2 * positions + 1)).sum()
