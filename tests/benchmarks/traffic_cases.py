"""Small cases that ``test_traffic`` lowers in a process of its own, which believes in a GPU."""

import torch
import torch.nn.functional as F
from torch import nn

from fastmae.benchmarks.traffic.described import described, fake
from fastmae.benchmarks.traffic.gpus import GPUS
from fastmae.benchmarks.traffic.kernel import Kernel
from fastmae.benchmarks.traffic.lower import compiled_kernels, eager_kernels
from fastmae.kernels import add_norm, short_attention
from fastmae.model.block.low_linear import weights_of

ROWS, DIM, HIDDEN = 4096, 96, 384
IMAGES, TOKENS, HEADS, HEAD_DIM = 4, 65, 2, 32


def lower_both() -> tuple[dict[str, list[Kernel]], list[Kernel]]:
    """Of both functions below, in one process."""
    return lower_mlp(), lower_operators()


def lower_operators() -> list[Kernel]:
    """The kernels of an attention and of a residual sum with its norm, without a compiler, and of a cast of weights."""
    with described(GPUS["H100"]):
        D = HEADS * HEAD_DIM
        packed = torch.empty(IMAGES, TOKENS, 3, HEADS, HEAD_DIM, dtype=torch.bfloat16, device="cuda", requires_grad=True)
        x = torch.empty(IMAGES, TOKENS, D, device="cuda", requires_grad=True)
        of_qkv, *weights = (torch.empty(n, device="cuda", requires_grad=True) for n in (3 * D, D, D, D))
        with torch.device("meta"):
            layer = fake(nn.Linear(D, HIDDEN))

        def loss() -> torch.Tensor:
            weights_of([layer], torch.bfloat16)
            branch = short_attention(packed, bias=of_qkv).flatten(2)
            return add_norm(x, branch, *weights[:2], 1e-6, weights[2], torch.bfloat16, use_sum=False)[1].square().sum()

        return eager_kernels(loss, [packed, of_qkv, x, *weights])


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
