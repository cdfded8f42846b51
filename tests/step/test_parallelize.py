"""A compiled model that several processes train: one graph, and the gradients of all."""

import os
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.backends.debugging import aot_eager

from fastmae.model.config import preset
from fastmae.model.mae import MAE
from fastmae.model.masking import random_masking
from fastmae.train.distributed.world import World
from fastmae.train.step.loss_module import LossModule
from fastmae.train.step.parallelize import no_reduction, parallelize
from fastmae.train.step.step import _WARM_UPS
from tests.support.forked import run_together
from tests.support.runs import free_port

MODEL = preset("tiny", img_size=32, patch_size=8, depth=2, decoder_depth=1)  # more than one of DDP's buckets


def batch(rank):
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(rank))
    return images, random_masking(3, MODEL.patches, 0.75, seed=rank)


def model():
    torch.manual_seed(0)
    return LossModule(MAE(MODEL))


def compiled_process(rank, size, port, folder):
    """Count the graphs of a warm-up and a step of two micro-batches, and keep its gradients."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=size)
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)

    torch.compile = partial(torch.compile, backend=count)
    module = parallelize(model(), World(rank, size, torch.device("cpu")), compile="model")
    images, masking = batch(rank)
    for _ in range(_WARM_UPS):
        module(images, *masking).backward()
    module.zero_grad()
    with no_reduction(module):
        module(images, *masking).backward()
    module(images, *masking).backward()
    gradients = {name.rpartition("model.")[2]: p.grad for name, p in module.named_parameters() if p.requires_grad}
    torch.save({"graphs": len(graphs), "gradients": gradients}, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.cluster
def test_a_model_compiled_as_one_graph_stays_one_and_shares_its_gradients(tmp_path):
    port = free_port()
    run_together(compiled_process, [(rank, 2, port, tmp_path) for rank in range(2)])
    alone = model()
    for rank in range(2):
        images, masking = batch(rank)
        alone(images, *masking).backward()  # twice in each process, and their mean: the sum of both
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert found["graphs"] == 1
        assert found["gradients"].keys() == {n.removeprefix("model.") for n, p in alone.named_parameters() if p.requires_grad}
        for name, p in alone.model.named_parameters():
            if p.requires_grad:
                torch.testing.assert_close(found["gradients"][name], p.grad, rtol=1e-4, atol=1e-6, msg=name)
