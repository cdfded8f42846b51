"""Every op inside a compiled graph: one graph, the batch left open, values and gradients as in eager mode."""

import pytest
import torch

from fastmae import kernels

pytestmark = pytest.mark.worth(1)

L, K, p = 16, 4, 4


def ids(B, device):
    epochs, samples = torch.zeros(B, dtype=torch.int64, device=device), torch.arange(B, device=device)
    return kernels.random_masking(7, epochs, samples, L, K, L - K)


def masks(x):
    epochs = torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)
    return kernels.random_masking(7, epochs, torch.arange(x.shape[0], device=x.device), L, K, L - K)[0]


def assemble(x):
    ids_keep, ids_predict, _ = ids(x.shape[0], x.device)
    positions = torch.linspace(0, 1, (1 + L) * x.shape[2], device=x.device).view(1 + L, -1)
    return kernels.decoder_input(x[:, : 1 + K], x[0, -1], positions, ids_keep, ids_predict)


def shuffle(x):
    ids_keep, _, ids_restore = ids(x.shape[0], x.device)
    return kernels.take_rows(x, ids_keep, ids_restore)


def loss(x):
    images = torch.linspace(0, 1, 3 * 16 * 16, device=x.device).view(1, 3, 16, 16).expand(x.shape[0], -1, -1, -1)
    return kernels.masked_mse(x[:, : L - K], images, ids(x.shape[0], x.device)[1], p, True)


def pixels(x):
    return kernels.gather_patches(x.reshape(-1, 3, 16, 16), ids(x.shape[0], x.device)[0], p)


def norm(x):
    total, normed = kernels.add_norm(x, 2 * x, x[0, 0], x[0, 1], 1e-6, x[0, 2])
    return total + normed


def activation(x):
    return kernels.gelu(x, x[0, 0])


@pytest.mark.parametrize("function", [masks, assemble, shuffle, loss, pixels, norm, activation], ids=lambda f: f.__name__)
def test_an_op_compiles_into_one_graph_with_an_open_batch(function, device):
    graphs = []

    def count(module, inputs):
        graphs.append(module)
        return module

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="inductor" if device == "cuda" else "aot_eager")
    once = torch.compile(function, fullgraph=True, dynamic=True, backend=count)
    for B in (3, 5):
        x = torch.randn(B, L, 3 * p * p, device=device, requires_grad=True)
        once(x)
        found, expected = compiled(x), function(x)
        torch.testing.assert_close(found, expected)
        if expected.requires_grad:
            weight = torch.randn_like(expected)
            torch.testing.assert_close(torch.autograd.grad(found, x, weight), torch.autograd.grad(expected, x, weight))
    assert len(graphs) == 1
