"""From a model to a model trained by many ranks: compiled, then DDP or FSDP2. The model itself knows nothing of it.

- ``ddp``: every rank holds the full model; gradients are averaged in buckets while the backward pass still runs.
- ``fsdp``: weights, gradients and moments are sharded over all ranks, one unit a block (FSDP2, ``fully_shard``).
- ``hsdp``: sharded over the ranks of a node, where links are fast, and replicated over nodes.

Weights stay float32 and are gathered as such: lower precision is autocast's, so that all three train on the same arithmetic.
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
from fastmae.train.config.modes import PARALLEL, REDUCE
from fastmae.train.distributed.world import World
from fastmae.train.step.loss_module import LossModule, compiled


def parallelize(
    module: LossModule, world: World, *, how: str = "ddp", compile: str = "auto", reduce: str = "fp32"
) -> nn.Module:
    """``module``, compiled and parallelized over the ranks of ``world``; compiled alone if there is one.

    ``how``: one of ``PARALLEL``. ``compile``: as for ``compiled``. ``reduce``: the dtype in which gradients are reduced;
    bf16 halves the bytes, and rounds. Make the optimizer afterwards: ``fsdp`` and ``hsdp`` replace the parameters. Raises
    InputError on other values, on ``compile="model"`` of a sharded model, or if nodes differ in their number of ranks.
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
        raise InputError("a model sharded by fsdp or hsdp is compiled block by block: --compile blocks")
    return _sharded(compiled(module, compile, world.size), _mesh(world, how), reduce)


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


def _sharded(module: LossModule, mesh: DeviceMesh, reduce: str) -> FSDPModule:
    policy = MixedPrecisionPolicy(reduce_dtype=torch.bfloat16 if reduce == "bf16" else torch.float32)
    # Tables of positions are constants, of first dimension 1: sharded, they would be padded to one copy for each rank.
    constants = {p for p in module.parameters() if not p.requires_grad}
    for block in (*module.model.blocks, *module.model.decoder_blocks):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    return fully_shard(module, mesh=mesh, mp_policy=policy, ignored_params=constants)


def _mesh(world: World, how: str) -> DeviceMesh:
    if how == "fsdp":
        return init_device_mesh(world.device.type, (world.size,), mesh_dim_names=("shard",))
    nodes, rest = divmod(world.size, world.local_size)
    if rest:
        raise InputError(f"hsdp needs the same number of ranks on every node, got {world.size}, {world.local_size} here")
    hosts = world.gather([socket.gethostname()])
    blocks = [set(hosts[i : i + world.local_size]) for i in range(0, world.size, world.local_size)]
    if any(len(block) > 1 for block in blocks):
        raise InputError(f"hsdp needs consecutive ranks on each node, got {hosts}; srun: --distribution=block")
    return init_device_mesh(world.device.type, (nodes, world.local_size), mesh_dim_names=("replicate", "shard"))


@contextlib.contextmanager
def no_reduction(module: nn.Module):
    """Inside, backward passes accumulate gradients without reducing them over ranks."""
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
    """The groups that a sharded ``module`` communicates in."""
    meshes = {p.device_mesh for p in module.parameters() if isinstance(p, DTensor)}
    return [group for mesh in meshes for group in mesh.get_all_groups()]


def is_sharded(module: nn.Module) -> bool:
    """Whether this rank holds only a shard of ``module``."""
    return any(isinstance(p, DTensor) for p in module.parameters())


def full(x: Tensor) -> Tensor:
    """All of ``x``, of which this rank may hold a shard; a collective of all ranks then."""
    return x.full_tensor() if isinstance(x, DTensor) else x
