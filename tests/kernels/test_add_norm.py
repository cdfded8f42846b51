"""add_norm: the residual sum, its LayerNorm and all their gradients against float64, in every pair of dtypes."""


import pytest
import torch
import torch.nn.functional as F

from fastmae.kernels import add_norm
from tests.support.exactness import assert_as_exact_as_torch
from tests.support.twins import twin

pytestmark = pytest.mark.worth(1)

EPS = 1e-6
SHAPES = [(3, 5, 33), twin((1, 1)), twin((1, 1280)), twin((70, 192)), twin((2, 3, 768)), twin((17, 512)), twin((9, 1024))]
DTYPES = [  # of the stream, the branch, and the normed sum
    (torch.float32, torch.float32, torch.float32),
    twin((torch.float32, torch.bfloat16, torch.bfloat16)),
    twin((torch.bfloat16, torch.bfloat16, torch.bfloat16)),
    twin((torch.float32, torch.float16, torch.float16)),
    twin((torch.float16, torch.float16, torch.float32)),
]


def inputs(shape, x_dtype, branch_dtype, device, requires_grad=True):
    """x, branch, weight, bias and branch_bias."""
    D = shape[-1]
    tensors = (torch.randn(shape, device=device).to(x_dtype), torch.randn(shape, device=device).to(branch_dtype),
               1 + 0.1 * torch.randn(D, device=device), *torch.randn(2, D, device=device).unbind(0))  # fmt: skip
    return tuple(t.detach().requires_grad_(requires_grad) for t in tensors)


def in_torch(x, branch, weight, bias, branch_bias, dtype):
    """What torch does, with x's roundings; autograd sums the gradient of a bias that was added to the branch."""
    compute = torch.promote_types(x.dtype, torch.float32)
    if branch is not None:
        bias_of_branch = branch_bias.to(compute)
        x = (x.to(compute) + branch.to(compute) + (bias_of_branch - bias_of_branch.detach())).to(x.dtype)
    return x, F.layer_norm(x.to(compute), x.shape[-1:], weight.to(compute), bias.to(compute), EPS).to(dtype)


def gradients(outputs, tensors, weights):
    return torch.autograd.grad(sum((o * w.to(o.dtype)).sum() for o, w in zip(outputs, weights, strict=True)), tensors)


def assert_exact(tensors, dtype, weights):
    """Outputs and gradients of ``add_norm`` of ``tensors`` are as exact as torch's; the third may be missing."""
    doubles = tuple(None if t is None else t.detach().double().requires_grad_() for t in tensors)
    *four, branch_bias = tensors
    runs = (
        (add_norm(*four, EPS, branch_bias, dtype), tensors),
        (in_torch(*tensors, dtype), tensors),
        (in_torch(*doubles, torch.float64), doubles),
    )
    found = [(*outputs, *gradients(outputs, [t for t in ts if t is not None], weights)) for outputs, ts in runs]
    for ours, torch_says, exact in zip(*found, strict=True):
        assert_as_exact_as_torch(ours.detach(), torch_says.detach(), exact.detach())


def gradients_of_outputs(shape, device):
    """The same numbers in every dtype."""
    return torch.randint(-16, 17, (2, *shape), device=device) / 8


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_sum_norm_and_gradients_are_as_exact_as_torchs(shape, dtypes, device):
    x_dtype, branch_dtype, dtype = dtypes
    assert_exact(inputs(shape, x_dtype, branch_dtype, device), dtype, gradients_of_outputs(shape, device))
