"""The state of a run as named tensors: what a checkpoint holds and a resumed run loads.

    model/NAME   optimizer/SLOT/NAME   step/NAME   loss_scale/NAME   spikes/NAME   random/RANK/DEVICE

Its step, position in the data and schedule are plain numbers, in ``state.json``.
"""

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW

from fastmae.train.distributed.world import World

_SLOTS = ("step", "exp_avg", "exp_avg_sq")


def run_tensors(model: nn.Module, optimizer: AdamW, **others: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a run themselves, no copies; ``others`` by the first part of their names."""
    make_moments(optimizer)
    tensors = {f"model/{name}": tensor.detach() for name, tensor in model.state_dict().items()}
    names = {parameter: name for name, parameter in model.named_parameters()}
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        tensors |= {f"optimizer/{slot}/{names[parameter]}": optimizer.state[parameter][slot] for slot in _SLOTS}
    return tensors | {f"{first}/{name}": tensor for first, named in others.items() for name, tensor in named.items()}


def make_moments(optimizer: AdamW) -> None:
    """Give ``optimizer`` the moments that AdamW makes in its first step: zeros."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            if not optimizer.state[p]:
                step = torch.zeros((), dtype=torch.float32, device=p.device)
                optimizer.state[p] = {"step": step, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}


def random_state(world: World) -> dict[str, Tensor]:
    """The states of this rank's generators. Order, crops and masks need none; other draws resume where they were."""
    state = {f"random/{world.rank}/cpu": torch.get_rng_state()}
    if world.device.type == "cuda":
        state[f"random/{world.rank}/cuda"] = torch.cuda.get_rng_state(world.device)
    return state


def set_random_state(state: dict[str, Tensor], world: World) -> None:
    """Restore what ``random_state`` gave, on the same rank."""
    torch.set_rng_state(state[f"random/{world.rank}/cpu"])
    if world.device.type == "cuda":
        torch.cuda.set_rng_state(state[f"random/{world.rank}/cuda"], world.device)


def share_out(tensors: dict[str, Tensor], world: World) -> dict[str, Tensor]:
    """Those of ``tensors`` that this rank writes: its shard of each sharded one, and about its share of the bytes of the
    others, which every rank has in full."""
    mine, loads = {}, [0] * world.size
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].nbytes, item[0])):
        if isinstance(tensor, DTensor):
            mine[name] = tensor
            continue
        rank = loads.index(min(loads))
        loads[rank] += tensor.nbytes
        if rank == world.rank:
            mine[name] = tensor
    return mine


def total_bytes(tensors: dict[str, Tensor]) -> int:
    """Bytes of all ``tensors``, sharded ones in full."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
