"""What a step sends on paper is what processes send: 2 and 4 of gloo, their sockets, and one of 512 whose group is a fake."""

import json
import math
import os
import socket

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from fastmae.benchmarks.scaling.collectives import Layout, sent_bytes, step_collectives, trained_elements, units
from fastmae.errors import InputError
from fastmae.model.config import preset
from fastmae.model.mae import MAE
from fastmae.train.distributed.join import machine_groups
from fastmae.train.distributed.world import World
from fastmae.train.step.loss_module import LossModule, MaskedLoss
from fastmae.train.step.optimizer import make_optimizer, parameter_groups
from fastmae.train.step.parallelize import parallelize
from fastmae.train.step.step import MicroBatch, Step
from tests.support.forked import run_together
from tests.support.wire import Wire, gloo_calls, socket_bytes

SMALL = preset("small", img_size=32, patch_size=8, depth=4, decoder_depth=2)  # 36 MB of gradients: three buckets
CASES = {  # processes -> (how, processes of a machine, dtype of the reduction, micro-batches)
    2: [("ddp", 2, "fp32", 1), ("ddp", 2, "bf16", 2), ("fsdp", 2, "bf16", 1)],
    4: [("ddp", 2, "fp32", 2), ("hsdp", 2, "fp32", 1), ("hsdp", 2, "bf16", 2)],
}
BASE = preset("base", img_size=32)  # ViT-B/16's weights, but for its tables of positions; small images, since CPUs are slow
FAKE = {"ddp": "fp32", "hsdp": "fp32", "fsdp": "bf16"}  # dtypes of the reduction
_UNTIL_SETTLED = {"ddp": 3, "fsdp": 0, "hsdp": 0}  # steps; DDP of a static graph settles its buckets as the third begins


def make_step(config, world, how, reduce):
    module = parallelize(LossModule(MAE(config)), world, how=how, compile="off", reduce=reduce)
    # Under autocast, as on GPUs, gradients come in the order of torch's own layers.
    optimizer = make_optimizer(parameter_groups(module, 0.05), (0.9, 0.95))
    loss = MaskedLoss(patch_size=config.patch_size, mask_ratio=0.75, seed=0)
    return Step(module, optimizer, loss, autocast=torch.bfloat16, mean=world.mean)


def micro_batches(config, images, count, rank=0):
    ids = torch.arange(images) + images * rank
    shape = (images, config.in_chans, *config.img_size)
    return [MicroBatch(torch.randint(0, 255, shape, dtype=torch.uint8), ids, torch.zeros_like(ids)) for _ in range(count)]


def observed(step, world, batches):
    with Wire() as wire:
        world.any(False, False)  # the trainer's vote
        step(batches, 1e-4)
    words = {getattr(world, name).group_name: name for name in ("control", "machine", "leaders") if getattr(world, name)}
    return [(s.kind, words.get(s.group, list(s.ranks)), s.elements, s.width) for s in wire.sent]


def real_process(rank, size, port, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=size)
    found = []
    for how, local, reduce, accumulate in CASES[size]:
        machine, leaders = machine_groups(size, local, backend="gloo")
        world = World(rank, size, torch.device("cpu"), dist.new_group(backend="gloo"), local_size=local, machine=machine,
                      leaders=leaders)  # fmt: skip
        step = make_step(SMALL, world, how, reduce)
        for _ in range(_UNTIL_SETTLED[how]):  # at first without accumulation
            step(micro_batches(SMALL, 2, 1, rank), 1e-4)
        batches = micro_batches(SMALL, 2, accumulate, rank)
        world.barrier()
        before = socket_bytes()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
            sent = observed(step, world, batches)
        world.barrier()  # whoever is slow has received everything
        # Connections of an earlier case's groups may be closed meanwhile.
        moved = sum(total - before.get(connection, 0) for connection, total in socket_bytes().items())
        found.append({"sent": sent, "gloo": gloo_calls(profile), "bytes": moved})
    if rank == 0:
        (folder / "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 4], ids=["2 processes", "4 processes"])
def real(request, tmp_path_factory):
    """The layout and the micro-batches of each case, and what rank 0 of so many processes sent."""
    folder = tmp_path_factory.mktemp("wire")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run_together(real_process, [(rank, request.param, port, folder) for rank in range(request.param)])
    cases = [(layout_of(how, request.param, local, reduce), n) for how, local, reduce, n in CASES[request.param]]
    return list(zip(cases, json.loads((folder / "found.json").read_text()), strict=True))


def predicted(config, layout, accumulate=1):
    """The same as ``observed``, from the prediction, of rank 0."""
    W = layout.processes
    ranks = {"world": list(range(W)), "shard": list(range(layout.local)), "replicate": list(range(0, W, layout.local)),
             }  # fmt: skip
    return [(c.kind, ranks.get(c.group, c.group), c.elements, c.width) for c in step_collectives(config, layout, accumulate)]


def layout_of(how, processes, local, reduce):
    return Layout(how=how, machines=processes // local, local=local, reduce=reduce)


def in_order(calls):
    return sorted(map(json.dumps, calls))


@pytest.mark.cluster
def test_processes_send_what_is_predicted(real):
    for (layout, accumulate), found in real:
        expected = predicted(SMALL, layout, accumulate)
        # A gather is asked for one unit ahead, so between passes the order is not that of the list.
        assert in_order(found["sent"]) == in_order(expected), (layout, accumulate)
        if layout.how == "ddp":
            assert found["sent"] == [list(call) for call in expected]


@pytest.mark.cluster
def test_gloo_runs_what_is_predicted(real):
    """The profile is made inside gloo. It has no reduce-scatter of its own: it all-reduces the whole."""
    for (layout, accumulate), found in real:
        expected = []
        for kind, ranks, elements, _ in predicted(SMALL, layout, accumulate):
            expected.append(("all_gather", elements // len(ranks)) if kind == "all_gather" else
                            ("all_reduce" if kind == "reduce_scatter" else kind, elements))  # fmt: skip
        assert in_order(found["gloo"]) == in_order(expected), (layout, accumulate)


@pytest.mark.cluster
def test_sockets_carry_the_bytes_of_rings(real):
    for (layout, accumulate), found in real:
        expected = 0.0
        for c in step_collectives(SMALL, layout, accumulate):
            kind = "all_reduce" if c.kind == "reduce_scatter" else c.kind  # as gloo does it
            expected += sent_bytes(kind, c.bytes, math.prod(layout.span(c.group)))
        assert found["bytes"] == pytest.approx(expected, rel=0.001), (layout, accumulate)  # headers of messages come on top


def answered(_, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """DDP's own all-reduce of a bucket; a fake group's answer has no tensor in it, which DDP would miss."""
    dist.all_reduce(bucket.buffer())
    future = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


def fake_process(config, folder):
    """Rank 0 of 512: its group answers at once and moves nothing, everything else is real."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=512)
    torch.set_num_threads(2)
    found = {}
    for how, reduce in FAKE.items():
        machine, leaders = machine_groups(512, 8, backend="fake")
        world = World(0, 512, torch.device("cpu"), dist.new_group(backend="fake"), local_size=8, machine=machine,
                      leaders=leaders)  # fmt: skip
        step = make_step(config, world, how, reduce)
        if how == "ddp":
            step.module.register_comm_hook(None, answered)
        for _ in range(_UNTIL_SETTLED[how]):
            step(micro_batches(config, 1, 1), 1e-4)
        held = sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in step.module.parameters())
        found[how] = {"sent": observed(step, world, micro_batches(config, 1, 1)), "held": held}
        del step
    (folder / "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[SMALL, pytest.param(BASE, marks=pytest.mark.all)], ids=["small", "base"])
def fake(request, tmp_path_factory):
    """A model, and what rank 0 of 512 processes, eight to a machine, sent and holds of it."""
    folder = tmp_path_factory.mktemp("fake")
    run_together(fake_process, [(request.param, folder)], 600)
    return request.param, json.loads((folder / "found.json").read_text())


@pytest.mark.cluster
@pytest.mark.parametrize("how", FAKE)
def test_one_of_512_processes_sends_what_is_predicted(fake, how):
    config, found = fake
    layout = layout_of(how, 512, 8, FAKE[how])
    assert in_order(found[how]["sent"]) == in_order(predicted(config, layout))
    parts = {"ddp": 1, "hsdp": 8, "fsdp": 512}[how]
    assert found[how]["held"] == sum(
        w.padded(parts) // parts if w.trained else w.elements for unit in units(config) for w in unit
    )


@pytest.mark.parametrize(("name", "trained"), [("base", 111_655_680), ("large", 329_239_296), ("huge", 656_613_964)])
def test_every_trained_weight_is_sent_once(name, trained):
    assert trained_elements(preset(name)) == trained
    for layout in (Layout(machines=64), Layout(machines=64, bucket=2**20), Layout(local=3, first_bucket=1)):
        buckets = [c for c in step_collectives(preset(name), layout, 4) if c.phase == "backward"]
        assert sum(c.elements for c in buckets) == trained and {c.micro_batch for c in buckets} == {3}
        assert all(c.bytes >= layout.bucket for c in buckets[1:-1])
    scattered = sum(c.elements for c in step_collectives(preset(name), Layout(how="fsdp", local=1, machines=2), 3)
                    if c.kind == "reduce_scatter")  # fmt: skip
    assert trained <= scattered < 1.001 * trained  # the tokens, (1, 1, D), are cut into two: one of them is padding


def test_a_run_of_one_sends_nothing():
    assert step_collectives(preset("base"), Layout(local=1), 2) == []


def test_accumulation_gathers_again_and_reduces_once():
    once, thrice = (step_collectives(SMALL, Layout(how="hsdp", machines=2, local=2), n) for n in (1, 3))
    gathers = [sum(c.kind == "all_gather" for c in sent) for sent in (once, thrice)]
    assert gathers == [1 + 2 * (SMALL.depth + SMALL.decoder_depth), 3 * gathers[0]]
    assert [c for c in thrice if c.kind != "all_gather"] == [
        c if c.phase == "vote" else c._replace(micro_batch=2) for c in once if c.kind != "all_gather"
    ]


def test_a_layout_is_checked():
    for wrong in ({"how": "pipeline"}, {"reduce": "fp8"}, {"machines": 0}, {"bucket": 0}):
        with pytest.raises(InputError, match="must be"):
            Layout(**wrong)
