"""A modelled timeline of a training step: when work and collectives begin and end, side by side.

A GPU computes one unit of the model after the other; links within machines and network cards between them each carry one
collective after the other, as soon as its data is ready and what is queued before it has been sent:

    bucket or gradient      after the backward pass of the unit that completes it, beside those of earlier units
    weights of a block      from the moment that the block before it begins; the block waits for them
    update                  after the last collective; memory's rate sets its time

The CPU votes, then launches; a step lasts as long as the slower of the two. The step's efficiency is the time of the model's
FLOPs (``fastmae.model.flops``) alone over the step's.
"""

from dataclasses import dataclass, replace
from functools import cache

from fastmae.benchmarks.scaling.cluster import Cluster
from fastmae.benchmarks.scaling.collectives import Collective, Layout, step_collectives, trained_elements
from fastmae.errors import InputError
from fastmae.model.config import ModelConfig, kept_patches
from fastmae.model.flops import training_flops

# Bytes of memory traffic per parameter in the update: AdamW reads weight, gradient and two moments and writes all but the
# gradient; the gradient's norm reads it once more. All float32.
_UPDATE_BYTES = 4 * (4 + 3 + 1)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The images of a GPU in a step."""

    images: int
    """Of the full step."""
    micro_batch: int
    """At once; the rest is accumulated."""
    mask_ratio: float = 0.75
    """Share of patches removed."""

    def __post_init__(self):
        if self.images < 1 or self.micro_batch < 1 or self.images % self.micro_batch:
            raise InputError(f"a GPU's images must be a multiple of its micro-batch, got {self.images} and {self.micro_batch}")

    @property
    def accumulate(self) -> int:
        """Micro-batches."""
        return self.images // self.micro_batch


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of a step."""

    work: float
    """The model's FLOPs alone."""
    launches: float
    """Kernel launches on the CPU."""
    vote: float
    """The CPU's wait for the vote."""
    exposed: float
    """The GPU's wait for collectives."""
    copies: float
    """Gradients and gathered weights copied into and out of the buffers that are sent."""
    update: float
    """AdamW and the gradient's norm."""
    gpu: float
    """The step without the vote."""
    total: float
    """The step."""

    @property
    def efficiency(self) -> float:
        """Share of the step that is the model's work."""
        return self.work / self.total


def step_time(config: ModelConfig, batch: Batch, layout: Layout, cluster: Cluster) -> StepTime:
    """The time of a step in steady state."""
    shares = unit_shares(config, batch.mask_ratio)
    work = batch.images * training_flops(config, batch.mask_ratio) / cluster.flops
    kernels = cluster.launches_besides + cluster.launches_per_block * (config.depth + config.decoder_depth)
    launches = batch.accumulate * kernels * cluster.launch
    # The GPU cannot run kernels faster than they come.
    busy = max(work, launches) / batch.accumulate
    forward, backward = ([busy * part * share for share in shares] for part in (1 / 3, 2 / 3))
    sent = step_collectives(config, layout, batch.accumulate)
    copies = cluster.move_seconds(_copied_bytes(sent, layout))
    run = _replicated if layout.how == "ddp" else _sharded
    end = run(sent, forward, backward, batch.accumulate, layout, cluster)
    held = trained_elements(config) / (layout.span("shard")[1] if layout.how == "hsdp" else
                                       layout.processes if layout.how == "fsdp" else 1)  # fmt: skip
    update = cluster.move_seconds(_UPDATE_BYTES * held)
    update += sum(_seconds(c, layout, cluster) for c in sent if c.phase == "update")
    vote = cluster.vote_seconds(layout.machines, layout.local)
    gpu = end + copies + update
    return StepTime(work=work, launches=launches, vote=vote, exposed=end - batch.accumulate * busy, copies=copies,
                    update=update, gpu=gpu, total=max(gpu, vote + launches))  # fmt: skip


@cache
def unit_shares(config: ModelConfig, mask_ratio: float) -> tuple[float, ...]:
    """The share of each of ``units`` in the model's FLOPs."""
    total = training_flops(config, mask_ratio)
    block = training_flops(replace(config, depth=config.depth + 1), mask_ratio) - total
    decoder_block = training_flops(replace(config, decoder_depth=config.decoder_depth + 1), mask_ratio) - total
    embedding = 4 * config.patches * config.patch_values * config.embed_dim
    bridge = 6 * (1 + kept_patches(config.patches, mask_ratio)) * config.embed_dim * config.decoder_embed_dim
    head = total - config.depth * block - config.decoder_depth * decoder_block - embedding - bridge
    parts = [embedding, *[block] * config.depth, bridge, *[decoder_block] * config.decoder_depth, head]
    return tuple(part / total for part in parts)


def held_bytes(config: ModelConfig, layout: Layout, accumulate: int = 1) -> float:
    """Bytes of weights, gradients and AdamW's two moments on a GPU, float32, in the middle of a backward pass. No activations.

    Of a sharded model also the two largest blocks, gathered (one computes, one arrives), and what is in no block; and with
    accumulation the full gradient, which waits unsharded to be sent.
    """
    everything = 16 * trained_elements(config)
    if layout.how == "ddp":
        return everything
    gathers = [c.bytes for c in step_collectives(config, layout) if c.kind == "all_gather"]
    shard = everything / (layout.local if layout.how == "hsdp" else layout.processes)
    waiting = 4 * trained_elements(config) if accumulate > 1 else 0
    return shard + gathers[0] + 2 * max(gathers) + waiting


class _Lane:
    """Links or cards: carry one transfer after the other."""

    def __init__(self):
        self.free = 0.0

    def carry(self, ready: float, seconds: float) -> float:
        """When a transfer that is ready at ``ready`` has arrived."""
        self.free = max(self.free, ready) + seconds
        return self.free


def _seconds(sent: Collective, layout: Layout, cluster: Cluster) -> float:
    return cluster.collective_seconds(sent.kind, sent.bytes, *layout.span(sent.group))


def _copied_bytes(sent: list[Collective], layout: Layout) -> float:
    """Memory traffic of the copies: a gradient is read and written into its buffer, gathered weights out of theirs; a bucket in
    bf16 is written from float32 and back."""
    total = 0.0
    for c in (c for c in sent if c.phase in ("forward", "backward")):
        if c.kind == "all_gather":
            total += 2 * c.bytes
        elif c.kind == "reduce_scatter":
            total += (4 + c.width) * c.elements
        elif layout.how == "ddp":
            total += (8 if c.width == 4 else 8 + 6 + 6) * c.elements
    return total


def _replicated(sent: list[Collective], forward: list[float], backward: list[float], accumulate: int, layout: Layout,
                cluster: Cluster) -> float:  # fmt: skip
    """When work and buckets are done."""
    now, lane = accumulate * sum(forward) + (accumulate - 1) * sum(backward), _Lane()
    for unit in reversed(range(len(backward))):
        now += backward[unit]
        for bucket in (c for c in sent if c.phase == "backward" and c.unit == unit):
            lane.carry(now, _seconds(bucket, layout, cluster))
    return max(now, lane.free)


def _sharded(sent: list[Collective], forward: list[float], backward: list[float], accumulate: int, layout: Layout,
             cluster: Cluster) -> float:  # fmt: skip
    """When work, gathers, scatters and the all-reduces over machines are done."""
    by_unit = {(c.micro_batch, c.phase, c.kind, c.unit): c for c in sent}
    links, cards = _Lane(), _Lane()

    def carry(lane: _Lane, ready: float, *key: object) -> float:
        return lane.carry(ready, _seconds(by_unit[key], layout, cluster)) if key in by_unit else ready

    passes = [(n, phase) for n in range(accumulate) for phase in ("forward", "backward")]
    units = range(len(forward))
    order = [(*which, unit) for which in passes for unit in (units if which[1] == "forward" else reversed(units))]
    now, arrived = 0.0, carry(links, 0.0, 0, "forward", "all_gather", 0)
    for (n, phase, unit), following in zip(order, [*order[1:], None], strict=True):
        began = max(now, arrived)
        # The next unit's weights are asked for as this one begins, so before this one's gradient is there.
        arrived = carry(links, began, *following[:2], "all_gather", following[2]) if following else began
        now = began + (forward if phase == "forward" else backward)[unit]
        if phase == "backward":
            scattered = carry(links, now, n, phase, "reduce_scatter", unit)
            carry(cards, scattered, n, phase, "all_reduce", unit)
    return max(now, links.free, cards.free)
