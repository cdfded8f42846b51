"""gelu: values, and the gradients of x and of the bias before it, against float64."""

import importlib

import pytest
import torch
import torch.nn.functional as F

from fastmae.kernels import gelu
from tests.support.exactness import assert_as_exact_as_torch
from tests.support.twins import twin

pytestmark = pytest.mark.worth(1)

SHAPES = [(3, 5, 33), twin((1, 1)), twin((19, 768)), twin((2, 3, 300)), twin((9, 1))]
DTYPES = [torch.float32, twin(torch.bfloat16), twin(torch.float16)]


def inputs(shape, dtype, device):
    """x and the bias, and numbers for y's gradient that are the same in every dtype."""
    x = (2 * torch.randn(shape, device=device)).to(dtype).requires_grad_()
    return x, torch.randn(shape[-1], device=device, requires_grad=True), torch.randint(-16, 17, shape, device=device) / 8


def gradients(y, tensors, grad):
    return torch.autograd.grad(y, tensors, grad.to(y.dtype))


def assert_exact(x, bias, grad):
    """The bias's gradient is as exact as if torch had summed x's in float32, not rounded to x's dtype before."""
    double, y = x.detach().double().requires_grad_(), gelu(x, bias)
    grad_x, grad_bias = gradients(y, (x, bias), grad)
    own, exact = (gradients(F.gelu(t), (t,), grad)[0] for t in (x, double))
    single = x.detach().float().requires_grad_()
    unrounded = gradients(F.gelu(single), (single,), grad)[0]
    assert_as_exact_as_torch(y.detach(), F.gelu(x).detach(), F.gelu(double).detach())
    assert_as_exact_as_torch(grad_x, own, exact)
    assert_as_exact_as_torch(grad_bias, *(g.reshape(-1, x.shape[-1]).sum(0) for g in (unrounded, exact)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_are_as_exact_as_torchs(shape, dtype, device):
    assert_exact(*inputs(shape, dtype, device))


def test_a_program_of_the_gradient_takes_many_tiles_of_rows(device, monkeypatch):
    """As on a GPU, where rows are many more than programs."""
    monkeypatch.setattr(importlib.import_module("fastmae.kernels.gelu"), "_MOST_PROGRAMS", 3)
    assert_exact(*inputs((45, 11) if device == "cpu" else (5000, 11), torch.float32, device))


def test_without_a_bias_it_is_torchs(device):
    x, _, grad = inputs((3, 33), torch.float32, device)
    assert torch.equal(gelu(x), F.gelu(x))
    assert torch.equal(*(gradients(f(x), (x,), grad)[0] for f in (gelu, F.gelu)))


def test_far_from_zero_the_derivative_is_0_or_1(device):
    x = torch.tensor([[-1e18, -1e9, -60.0, 60.0, 1e9, 1e18]], device=device, requires_grad=True)
    bias = torch.zeros(6, device=device, requires_grad=True)
    for found in gradients(gelu(x, bias), (x, bias), torch.ones_like(x)):
        assert found.flatten().tolist() == [0, 0, 0, 1, 1, 1]


def test_the_bias_is_not_read_and_its_gradient_has_its_dtype(device):
    x, _, grad = inputs((3, 33), torch.float32, device)
    bias = torch.full((33,), torch.nan, dtype=torch.bfloat16, device=device, requires_grad=True)
    y = gelu(x, bias)
    assert torch.equal(y, F.gelu(x)) and gradients(y, (bias,), grad)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, twin(torch.bfloat16)])
def test_the_gradient_is_made_in_xs_dtype(dtype, device):
    """Of the op itself: autograd would silently convert another dtype, after it has taken its memory."""
    x, grad = torch.randn(2, 4, 20, device=device).to(dtype)
    grad_x, partial = torch.ops.fastmae.gelu_bwd(grad, x)
    assert grad_x.dtype == dtype and partial.dtype == torch.float32


def test_two_runs_give_equal_bits(device):
    x, bias, grad = inputs((50, 33), torch.float32, device)
    runs = [gradients(gelu(x, bias), (x, bias), grad) for _ in range(2)]
    assert all(torch.equal(*pair) for pair in zip(*runs, strict=True))


def test_non_contiguous_inputs_are_read_rightly(device):
    x, bias, grad = inputs((4, 6, 20), torch.float32, device)
    strided = x.detach().mT.contiguous().mT.requires_grad_()
    found = gradients(gelu(strided, bias), (strided, bias), grad.transpose(0, 1).contiguous().transpose(0, 1))
    assert all(torch.equal(*pair) for pair in zip(found, gradients(gelu(x, bias), (x, bias), grad), strict=True))


def test_no_rows_give_no_gradients(device):
    x, bias, grad = inputs((0, 20), torch.float32, device)
    grad_x, grad_bias = gradients(gelu(x, bias), (x, bias), grad)
    assert grad_x.shape == (0, 20) and torch.equal(grad_bias, torch.zeros_like(bias))


def test_float64_gradients_pass_gradcheck():
    x, bias, _ = inputs((2, 3, 5), torch.float32, "cpu")
    x, bias = x.detach().double().requires_grad_(), bias.detach().double().requires_grad_()
    added = lambda x, bias: gelu(x + bias.detach(), bias)  # noqa: E731  as by the linear layer before
    assert torch.autograd.gradcheck(lambda x: added(x, bias), (x,))
    grad_x, grad_bias = gradients(added(x, bias), (x, bias), torch.ones_like(x))
    torch.testing.assert_close(grad_bias, grad_x.sum((0, 1)))


@pytest.mark.twin
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.all)])
def test_it_compiles_into_one_graph(backend, device):
    x, bias, grad = inputs((3, 5, 20), torch.bfloat16, device)

    def step(x, bias):
        return gelu(x * 2, bias) + 1

    outputs = torch.compile(step, fullgraph=True, backend=backend)(x, bias), step(x, bias)
    for one, two in zip(*((o, *gradients(o, (x, bias), grad)) for o in outputs), strict=True):
        torch.testing.assert_close(one, two, rtol=2**-7 if one.dtype == torch.bfloat16 else 1e-5, atol=2**-6)


@pytest.mark.twin
def test_op_passes_opcheck(device):
    x, grad = torch.randn(2, 3, 5, 20, device=device)
    torch.library.opcheck(torch.ops.fastmae.gelu_bwd.default, (grad, x))
    torch.library.opcheck(torch.ops.fastmae.gelu_bwd.default, (grad.bfloat16(), x.bfloat16().mT.contiguous().mT))


@pytest.mark.parametrize(
    ("x", "bias", "message"),
    [
        (torch.zeros(()), torch.zeros(5), r"x must be floating point \(..., D\), got torch.float32 \(\)"),
        (torch.zeros(2, 5).int(), None, "got torch.int32"),
        (torch.zeros(2, 5), torch.zeros(2, 5), r"bias must be floating point \(5,\), got torch.float32 \(2, 5\)"),
        (torch.zeros(2, 5), torch.zeros(5).int(), "got torch.int32"),
        (torch.zeros(2, 5), torch.zeros(5, device="meta"), "on the device of x, cpu, got meta"),
    ],
)
def test_wrong_arguments_are_named(x, bias, message):
    with pytest.raises(ValueError, match=message):
        gelu(x, bias)
