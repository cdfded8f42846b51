"""From a model to a model trained by many processes: compiled, then DDP or FSDP2. The model itself knows nothing of it.

- ``ddp``: every process holds everything; gradients are averaged in buckets while the backward pass still runs.
- ``fsdp``: weights, gradients and moments are cut over all processes, one unit a block (FSDP2, ``fully_shard``).
- ``hsdp``: cut over the processes of a machine, where links are fast, and replicated over machines.

Weights stay float32 and are gathered as such: what is computed in lower precision is autocast's affair, so that all three
train on the same arithmetic.
"""

import contextlib
import socket
import warnings

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from fastmae.errors import InputError
from fastmae.train.config.run import PARALLEL, REDUCE
from fastmae.train.distributed.world import World
from fastmae.train.step.loss_module import LossModule, compiled


def parallelize(
    module: LossModule, world: World, *, how: str = "ddp", compile: str = "auto", reduce: str = "fp32"
) -> nn.Module:
    """``module``, compiled and shared by the processes of ``world``; in a run of one, compiled alone.

    ``how``: one of ``PARALLEL``. ``compile``: as for ``compiled``. ``reduce``: the dtype in which gradients travel; bf16
    halves the bytes, and rounds. Make the optimizer afterwards: ``fsdp`` and ``hsdp`` put other parameters in place. Raises
    InputError on words that are none of these, on ``compile="model"`` of a cut model, or if machines differ in processes.
    """
    if how not in PARALLEL or reduce not in REDUCE:
        raise InputError(
            f"parallel must be one of {', '.join(PARALLEL)} and reduce one of {', '.join(REDUCE)}, got {how}, {reduce}"
        )
    if world.size == 1:
        return compiled(module, compile)
    if how == "ddp":
        return _replicated(compiled(module, compile, world.size), world, reduce)
    if compile == "model":
        raise InputError("a model that is cut by fsdp or hsdp is compiled block by block: --compile blocks")
    return _cut(compiled(module, compile, world.size), _mesh(world, how), reduce)


def _replicated(module: nn.Module, world: World, reduce: str) -> DistributedDataParallel:
    ids = [world.device.index] if world.device.type == "cuda" else None
    with warnings.catch_warnings():
        # Buffers are constants, so none is sent. torch 2.13 has a new name for that, which 2.11 does not know.
        warnings.simplefilter("ignore", FutureWarning)
        shared = DistributedDataParallel(
            module, device_ids=ids, gradient_as_bucket_view=True, broadcast_buffers=False, static_graph=True
        )
    if reduce == "bf16":
        shared.register_comm_hook(dist.group.WORLD, _in_bf16)
    return shared


def _in_bf16(group: dist.ProcessGroup, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    return bf16_compress_hook(group, bucket)  # under its own name DDP refuses it on gloo, which sums bf16 as well


def _cut(module: LossModule, mesh: DeviceMesh, reduce: str) -> FSDPModule:
    policy = MixedPrecisionPolicy(reduce_dtype=torch.bfloat16 if reduce == "bf16" else torch.float32)
    # Tables of positions are constants, of first dimension 1: cut, they would be padded to one copy for each process.
    constants = {p for p in module.parameters() if not p.requires_grad}
    for block in (*module.model.blocks, *module.model.decoder_blocks):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    return fully_shard(module, mesh=mesh, mp_policy=policy, ignored_params=constants)


def _mesh(world: World, how: str) -> DeviceMesh:
    if how == "fsdp":
        return init_device_mesh(world.device.type, (world.size,), mesh_dim_names=("shard",))
    machines, rest = divmod(world.size, world.local_size)
    if rest:
        raise InputError(f"hsdp needs the same number of processes on every machine, got {world.size}, {world.local_size} here")
    hosts = world.gather([socket.gethostname()])
    blocks = [set(hosts[i : i + world.local_size]) for i in range(0, world.size, world.local_size)]
    if any(len(block) > 1 for block in blocks):
        raise InputError(f"hsdp needs the ranks of a machine to follow each other, got {hosts}; srun: --distribution=block")
    return init_device_mesh(world.device.type, (machines, world.local_size), mesh_dim_names=("replicate", "shard"))


@contextlib.contextmanager
def gradients_stay(module: nn.Module):
    """Inside, backward passes add up gradients without sending them."""
    if isinstance(module, DistributedDataParallel):
        with module.no_sync():
            yield
    elif isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            module.set_requires_gradient_sync(True)
    else:
        yield


def groups_of(module: nn.Module) -> list[dist.ProcessGroup]:
    """The groups that a cut ``module`` communicates in."""
    meshes = {p.device_mesh for p in module.parameters() if isinstance(p, DTensor)}
    return [group for mesh in meshes for group in mesh.get_all_groups()]


def is_cut(module: nn.Module) -> bool:
    """Whether this process holds only a part of ``module``."""
    return any(isinstance(p, DTensor) for p in module.parameters())


def whole(x: Tensor) -> Tensor:
    """All of ``x``, if this process holds a part of it; every process must ask."""
    return x.full_tensor() if isinstance(x, DTensor) else x
