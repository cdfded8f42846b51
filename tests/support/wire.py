"""What a process really sends: the collectives that torch is asked for, those that gloo runs, and the bytes of its sockets."""

import os
import socket
import struct
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

_KINDS = {  # operator -> (kind, which of its arguments is the whole)
    "c10d::allreduce_": ("all_reduce", 0),
    "c10d::_allgather_base_": ("all_gather", 0),
    "c10d::_reduce_scatter_base_": ("reduce_scatter", 1),
    "_c10d_functional::all_reduce": ("all_reduce", 0),
    "c10d::broadcast_": ("broadcast", 0),
}
_NO_COLLECTIVES = ("_c10d_functional::wait_tensor", "_c10d_functional::_wrap_tensor_autograd")
_BYTES_SENT = 200  # offset of tcpi_bytes_sent and tcpi_bytes_retrans in Linux' struct tcp_info (linux/tcp.h, since 4.19)


class Sent(NamedTuple):
    """A collective as it was asked for."""

    kind: str
    ranks: tuple[int, ...]
    elements: int
    width: int
    group: str
    """The group's own name."""


class Wire(TorchDispatchMode):
    """Inside, every collective is taken down, also those that DDP's C++ part starts from its hooks."""

    def __init__(self):
        super().__init__()
        self.sent: list[Sent] = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # it comes back as the collectives that it means
        name = op._schema.name
        if op.namespace in ("c10d", "_c10d_functional") and name not in _NO_COLLECTIVES:
            kind, place = _KINDS[name]
            whole = args[place][0] if isinstance(args[place], list) else args[place]
            group = next(_group(a) for a in args[1:] if isinstance(a, torch.ScriptObject | str) and _group(a) is not None)
            ranks = tuple(dist.get_process_group_ranks(group))
            self.sent.append(Sent(kind, ranks, whole.numel(), whole.element_size(), group.group_name))
        return op(*args, **(kwargs or {}))


def gloo_calls(profile) -> list[tuple[str, int]]:
    """What gloo ran, and on how many elements of this process, from torch's profile of it."""
    found = [e for e in profile.events() if e.name.startswith("gloo:")]
    return [(e.name.removeprefix("gloo:"), sum(torch.Size(shape).numel() for shape in e.input_shapes)) for e in found]


def socket_bytes() -> dict[str, int]:
    """Bytes that this process has sent, each counted once, by open TCP connection."""
    found = {}
    for place in Path("/proc/self/fd").iterdir():
        try:
            if (name := str(place.readlink())).startswith("socket:"):
                with socket.socket(fileno=os.dup(int(place.name))) as connection:
                    if connection.type == socket.SOCK_STREAM and connection.family in (socket.AF_INET, socket.AF_INET6):
                        info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                        sent, again = struct.unpack_from("QQ", info, _BYTES_SENT)
                        found[name] = sent - again
        except OSError:  # closed meanwhile
            continue
    return found


def _group(argument) -> dist.ProcessGroup | None:
    if isinstance(argument, str):
        return _resolve_process_group(argument) if argument not in ("sum", "max", "avg") else None
    try:
        return dist.ProcessGroup.unbox(argument)
    except (RuntimeError, TypeError):  # a ReduceOp
        return None
