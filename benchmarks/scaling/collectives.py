"""What a training step sends: every collective of DDP, FSDP2 and HSDP, with its elements and bytes. Counts, no times.

    DDP    the gradient, in buckets, each closed by the tensor that fills it: all-reduce over all processes
    FSDP   a block's weights before its forward and before its backward pass: all-gather; its gradient: reduce-scatter
    HSDP   the same within a machine; then the shard of the gradient over machines: all-reduce
    all    the gradient's norm, if tensors are sharded, and the loss: all-reduce; the vote before the step, on the CPU:
           all-reduce, on several nodes among the ranks of each, then among the first of each, and back by broadcast

A ring of W processes sends, of S bytes, 2 (W-1)/W S from each in an all-reduce and (W-1)/W S in the other two. Shapes are read
from the model itself, built on the meta device. Sources: Li et al. 2020 (arXiv 2006.15704) for DDP's buckets, Zhao et al. 2023
(arXiv 2304.11277) for FSDP and HSDP; tests/benchmarks/test_collectives.py compares with what processes really send.
"""

import math
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from fastmae.errors import InputError
from fastmae.model.config import ModelConfig
from fastmae.model.mae import MAE
from fastmae.train.config.modes import PARALLEL, REDUCE

_VOTES = 2  # flags of ``World.any`` before a step: has a process failed, has one been asked to stop


class Collective(NamedTuple):
    """One collective of one process."""

    kind: str
    """all_reduce, all_gather, reduce_scatter or broadcast."""
    group: str
    """world: all processes; shard: those of a machine; replicate: one of each machine. On the CPU: control, all; machine; and
    leaders, the first ones of all machines."""
    elements: int
    """In full: what is reduced, the result of a gather, the input of a scatter."""
    width: int
    """Bytes of an element."""
    unit: int
    """Index in ``units`` of the block that waits for it or that it waits for; -1 for the full model."""
    phase: str
    """forward, backward, update or vote."""
    micro_batch: int = 0
    """Of the step, in which it is sent."""

    @property
    def bytes(self) -> int:
        """In full."""
        return self.elements * self.width


class Weight(NamedTuple):
    """A parameter's shape."""

    shape: tuple[int, ...]
    trained: bool

    @property
    def elements(self) -> int:
        """Numbers in it."""
        return math.prod(self.shape)

    def padded(self, processes: int) -> int:
        """Elements once its first dimension is sharded evenly: (1, 1, D) becomes ``processes`` times as large."""
        first, *rest = self.shape
        return -(-first // processes) * processes * math.prod(rest)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How processes share a model."""

    how: str = "ddp"
    """ddp, fsdp or hsdp."""
    machines: int = 1
    """Machines of the run."""
    local: int = 8
    """Processes on each of them."""
    reduce: str = "fp32"
    """fp32 or bf16: the dtype in which gradients are sent."""
    bucket: int = 25 * 2**20
    """Bytes of float32 gradients that close a bucket of DDP: torch's default, 25 MiB."""
    first_bucket: int = 2**20
    """Bytes that close the first one, so that sending begins early: torch's default, 1 MiB."""

    def __post_init__(self):
        if self.how not in PARALLEL or self.reduce not in REDUCE:
            wanted = f"{', '.join(PARALLEL)} and {', '.join(REDUCE)}"
            raise InputError(f"how and reduce must be of {wanted}, got {self.how!r} and {self.reduce!r}")
        if min(self.machines, self.local, self.bucket, self.first_bucket) < 1:
            raise InputError(f"machines, processes and bytes of a bucket must be positive, got {self}")

    @property
    def processes(self) -> int:
        """Of the run."""
        return self.machines * self.local

    @property
    def width(self) -> int:
        """Bytes of an element of a gradient that is sent."""
        return 2 if self.reduce == "bf16" else 4

    def span(self, group: str) -> tuple[int, int]:
        """A group's (machines, processes on each)."""
        inside, across = (1, self.local), (self.machines, 1)
        spans = {"shard": inside, "machine": inside, "replicate": across, "leaders": across}
        return spans.get(group, (self.machines, self.local))


@cache
def units(config: ModelConfig) -> tuple[tuple[Weight, ...], ...]:
    """The weights of embedding, encoder blocks, bridge, decoder blocks and head, in the order of the forward pass.

    Inside a unit they are in the order in which torch's own layers finish their gradients.
    """
    with torch.device("meta"):
        weights = dict(MAE(config).named_parameters())

    def unit(*names: str) -> tuple[Weight, ...]:
        return tuple(_weight(weights.pop(name)) for name in names)

    def blocks(prefix: str, depth: int) -> list[tuple[Weight, ...]]:
        layers = ("mlp.fc2", "mlp.fc1", "norm2", "attn.proj", "attn.qkv", "norm1")
        return [unit(*(f"{prefix}.{i}.{x}.{end}" for x in layers for end in ("weight", "bias"))) for i in range(depth)]

    found = (
        unit("cls_token", "patch_embed.proj.bias", "patch_embed.proj.weight", "pos_embed"),
        *blocks("blocks", config.depth),
        unit("mask_token", "decoder_embed.weight", "decoder_embed.bias", "norm.weight", "norm.bias", "decoder_pos_embed"),
        *blocks("decoder_blocks", config.decoder_depth),
        unit("decoder_pred.weight", "decoder_pred.bias", "decoder_norm.weight", "decoder_norm.bias"),
    )
    assert not weights, f"weights that are in no unit: {list(weights)}"
    return found


def trained_elements(config: ModelConfig) -> int:
    """Parameters that are trained."""
    return sum(w.elements for unit in units(config) for w in unit if w.trained)


def step_collectives(config: ModelConfig, layout: Layout, accumulate: int = 1) -> list[Collective]:
    """All that a process sends in a steady-state step of ``accumulate`` micro-batches, in the order of the model's passes.

    Steady state: DDP has put its buckets into the order in which gradients come, which it does in its first step.
    """
    if layout.processes == 1:
        return []
    loss = Collective("all_reduce", "world", 1, 4, -1, "update", accumulate - 1)
    if layout.how == "ddp":
        return [*_vote(layout), *_buckets(config, layout, accumulate), loss]
    shard = "world" if layout.how == "fsdp" else "shard"
    found = _vote(layout)
    for number in range(accumulate):
        found += _sharded_pass(config, layout, shard, number, is_last=number == accumulate - 1)
    tensors = sum(w.trained for unit in units(config) for w in unit)
    return [*found, Collective("all_reduce", shard, tensors, 4, -1, "update", accumulate - 1), loss]


def sent_bytes(kind: str, size: int, processes: int) -> float:
    """Bytes that each of ``processes`` sends in a ring for a collective of ``size`` bytes."""
    return (2 if kind == "all_reduce" else 1) * (processes - 1) / processes * size


def _vote(layout: Layout) -> list[Collective]:
    """Of the first process of a machine; the others skip that of the leaders."""
    is_flat = layout.machines == 1 or layout.local == 1
    calls = (
        [("all_reduce", "control")]
        if is_flat
        else [("all_reduce", "machine"), ("all_reduce", "leaders"), ("broadcast", "machine")]
    )
    return [Collective(kind, group, _VOTES, 8, -1, "vote") for kind, group in calls]


def _weight(parameter: Tensor) -> Weight:
    return Weight(tuple(parameter.shape), parameter.requires_grad)


def _buckets(config: ModelConfig, layout: Layout, accumulate: int) -> list[Collective]:
    found, elements, limit = [], 0, layout.first_bucket
    for number, unit in reversed(list(enumerate(units(config)))):
        for weight in (w for w in unit if w.trained):
            elements += weight.elements
            if 4 * elements >= limit:
                found.append(Collective("all_reduce", "world", elements, layout.width, number, "backward", accumulate - 1))
                elements, limit = 0, layout.bucket
    if elements:
        found.append(Collective("all_reduce", "world", elements, layout.width, 0, "backward", accumulate - 1))
    return found


def _sharded_pass(config: ModelConfig, layout: Layout, shard: str, micro_batch: int, is_last: bool) -> list[Collective]:
    """Forward and backward pass of one micro-batch. What is in no block is gathered once and scattered in the end."""
    parts, size = units(config), math.prod(layout.span(shard))
    is_block = [0 < i < len(parts) - 1 and i != 1 + config.depth for i in range(len(parts))]
    rest = [w for part, own in zip(parts, is_block, strict=True) for w in part if not own and w.trained]

    def gather(weights: list[Weight] | tuple[Weight, ...], unit: int, phase: str) -> Collective:
        return Collective("all_gather", shard, sum(w.padded(size) for w in weights), 4, unit, phase, micro_batch)

    def reduce(weights: list[Weight] | tuple[Weight, ...], unit: int) -> list[Collective]:
        elements = sum(w.padded(size) for w in weights if w.trained)
        scatter = Collective("reduce_scatter", shard, elements, layout.width, unit, "backward", micro_batch)
        over = Collective("all_reduce", "replicate", elements // size, layout.width, unit, "backward", micro_batch)
        return [] if not is_last else [scatter] if layout.how == "fsdp" else [scatter, over]

    blocks = [(i, part) for i, part in enumerate(parts) if is_block[i]]
    found = [gather(rest, 0, "forward"), *(gather(part, i, "forward") for i, part in blocks)]
    for i, part in reversed(blocks):
        found += [gather(part, i, "backward"), *reduce(part, i)]
    return found + reduce(rest, 0)
