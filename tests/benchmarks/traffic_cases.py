"""Small cases that ``test_traffic`` lowers in a process of its own, which believes in a GPU."""

import torch
import torch.nn.functional as F
from torch import nn

from fastmae.benchmarks.traffic.described import described, fake
from fastmae.benchmarks.traffic.gpus import GPUS
from fastmae.benchmarks.traffic.kernel import Kernel
from fastmae.benchmarks.traffic.lower import compiled_kernels, eager_kernels

ROWS, DIM, HIDDEN = 4096, 96, 384


def lower_mlp() -> dict[str, list[Kernel]]:
    """The kernels of an MLP of ROWS rows, bf16 autocast, compiled and eager; the loss after it is eager in both."""
    found = {}
    with described(GPUS["H100"]):
        with torch.device("meta"):
            mlp = fake(nn.Sequential(nn.Linear(DIM, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, DIM)))
        x = torch.empty(ROWS, DIM, dtype=torch.bfloat16, device="cuda")
        for name, lower in (("compiled", compiled_kernels), ("eager", eager_kernels)):
            run = torch.compile(mlp, dynamic=False) if name == "compiled" else mlp

            def loss(run=run) -> torch.Tensor:
                with torch.autocast("cuda", dtype=torch.bfloat16):
                    return F.mse_loss(run(x), x)

            found[name] = lower(loss, list(mlp.parameters()))
    return found
