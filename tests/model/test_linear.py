"""The CPU's linear layers: values, gradients, what they keep, and who gets torch's own instead."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastmae.model.block.linear import Linear, gelu_linear, linear, norm_linear
from tests.support.exactness import assert_as_exact_as_torch

SHAPES = [((3, 5, 7), 11), ((1, 1, 4), 3), ((2, 13, 64), 48)]  # of x, width of the result


def tensors(shape, width, dtype=torch.float32):
    generator = torch.Generator().manual_seed(width)
    sizes = (shape, (width, shape[-1]), (width,), shape[-1:], shape[-1:])
    return [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in sizes]


def layers(weight, bias, scale, shift):
    norm, layer = nn.LayerNorm(len(scale), eps=1e-6), Linear(weight.shape[1], weight.shape[0])
    norm.weight, norm.bias, layer.weight, layer.bias = (nn.Parameter(p.detach()) for p in (scale, shift, weight, bias))
    return norm, layer


def torch_norm_linear(x, weight, bias, scale, shift):
    return F.linear(F.layer_norm(x, x.shape[-1:], scale, shift, 1e-6), weight, bias)


@pytest.mark.parametrize(("shape", "width"), SHAPES)
def test_linear_and_its_gradients_are_as_exact_as_torchs(shape, width):
    x, weight, bias, _, _ = tensors(shape, width)
    doubles = tensors(shape, width, torch.float64)[:3]
    ours, torchs, exact = linear(x, weight, bias), F.linear(x, weight, bias), F.linear(*doubles)
    assert type(ours.grad_fn) is not type(torchs.grad_fn)
    assert_as_exact_as_torch(ours, torchs, exact)
    gradient = torch.randn(exact.shape)
    found, torch_says = (torch.autograd.grad(y, (x, weight, bias), gradient) for y in (ours, torchs))
    for one, two, three in zip(found, torch_says, torch.autograd.grad(exact, doubles, gradient.double()), strict=True):
        assert_as_exact_as_torch(one, two, three)


@pytest.mark.parametrize(("shape", "width"), SHAPES)
def test_norm_linear_and_its_gradients_are_as_exact_as_torchs(shape, width):
    inputs, doubles = tensors(shape, width), tensors(shape, width, torch.float64)
    norm, layer = layers(*inputs[1:])
    ours, torchs, exact = norm_linear(inputs[0], norm, layer), torch_norm_linear(*inputs), torch_norm_linear(*doubles)
    assert_as_exact_as_torch(ours, torchs, exact)
    gradient = torch.randn(exact.shape)
    parameters = (inputs[0], layer.weight, layer.bias, norm.weight, norm.bias)
    found, torch_says = torch.autograd.grad(ours, parameters, gradient), torch.autograd.grad(torchs, inputs, gradient)
    for one, two, three in zip(found, torch_says, torch.autograd.grad(exact, doubles, gradient.double()), strict=True):
        assert_as_exact_as_torch(one, two, three)


@pytest.mark.parametrize(("shape", "width"), SHAPES)
def test_gelu_linear_and_its_gradients_are_as_exact_as_torchs(shape, width):
    x, weight, bias, scale, shift = tensors(shape, width)
    doubles = tensors(shape, width, torch.float64)[:3]
    _, layer = layers(weight, bias, scale, shift)
    ours, torchs, exact = gelu_linear(x, layer), F.linear(F.gelu(x), weight, bias), F.linear(F.gelu(doubles[0]), *doubles[1:])
    assert_as_exact_as_torch(ours, torchs, exact)
    gradient = torch.randn(exact.shape)
    kept = gradient.clone()
    found = torch.autograd.grad(ours, (x, layer.weight, layer.bias), gradient)
    assert torch.equal(gradient, kept)  # what is written in place is not the caller's
    torch_says = torch.autograd.grad(torchs, (x, weight, bias), gradient)
    for one, two, three in zip(found, torch_says, torch.autograd.grad(exact, doubles, gradient.double()), strict=True):
        assert_as_exact_as_torch(one, two, three)


def test_the_normalised_rows_are_not_kept():
    inputs = tensors((2, 13, 64), 48)
    norm, layer = layers(*inputs[1:])
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        norm_linear(inputs[0], norm, layer)
    own = {t.data_ptr() for t in (inputs[0], layer.weight, norm.weight, norm.bias)}
    assert sum(t.numel() for t in kept if t.data_ptr() not in own) == 2 * 2 * 13  # mean and 1/std of each row


def test_a_hook_on_a_layer_is_called():
    inputs = tensors((1, 3, 4), 5)
    norm, layer = layers(*inputs[1:])
    plain, seen = norm_linear(inputs[0], norm, layer), []
    norm.register_forward_hook(lambda *_: seen.append("norm"))
    layer.register_forward_hook(lambda *_: seen.append("layer"))
    torch.testing.assert_close(norm_linear(inputs[0], norm, layer), plain)
    assert seen == ["norm", "layer"]


def test_everything_else_uses_torchs_layers():
    def name(x, weight, bias, *_):
        return type(linear(x, weight, bias).grad_fn).__name__

    inputs = tensors((1, 3, 4), 5)
    assert "_Linear" in name(*inputs) and "_Linear" not in name(*tensors((1, 3, 4), 5, torch.float64))
    with torch.autocast("cpu"):
        assert "_Linear" not in name(*inputs)
    before = torch.backends.mkldnn.set_flags(_enabled=False)
    try:
        assert "_Linear" not in name(*inputs)
    finally:
        torch.backends.mkldnn.set_flags(_enabled=before[0])


def test_a_compiled_graph_holds_torchs_layers():
    x, weight, bias, _, _ = tensors((2, 3, 4), 5)
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, weight, bias), F.linear(x, weight, bias))
