"""Every attention backend gives the same values and gradients; choosing one by name or by probe is clear."""

import pytest
import torch

from fastmae.errors import InputError
from fastmae.model.attention import backends
from fastmae.model.attention import dot_product as attention_file
from fastmae.model.attention.backends import Shape
from fastmae.model.attention.dot_product import attention, attention_shapes, resolve
from fastmae.model.attention.probe import probe, why_not
from fastmae.model.config import BACKENDS, preset
from tests.support.exactness import assert_as_exact_as_torch

pytestmark = pytest.mark.worth(2)

SHAPES = [(2, 50, 50, 3, 64), (1, 65, 65, 2, 80), (2, 7, 23, 2, 32), (1, 1, 1, 1, 32)]  # B, N, M, H, d


def explicit(packed, q=None):
    q, k, v = packed.unbind(2) if q is None else (q, *packed.unbind(2))
    weights = torch.einsum("bnhd,bmhd->bhnm", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("bhnm,bmhd->bnhd", weights.softmax(-1), v)


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_equal_the_formulas(shape, backend, device):
    B, N, M, H, d = shape
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    if backend == "cudnn" and 1 in (N, M):
        pytest.skip("cuDNN's attention takes no sequence of one token")
    probe(device, dtype, [Shape(*shape[1:]) for shape in SHAPES])  # all at once: on a GPU that starts a process
    if backend != "auto" and (reason := why_not(backend, device, dtype, Shape(N, M, H, d))):
        pytest.skip(f"{backend} does not work here: {reason[:60]}")
    sizes = [(B, M, 3, H, d)] if N == M else [(B, M, 2, H, d), (B, N, H, d)]
    inputs = [torch.randn(size, device=device, dtype=dtype, requires_grad=True) for size in sizes]
    weight = torch.randn(B, N, H, d, device=device, dtype=dtype)
    exact_inputs = [t.detach().double().requires_grad_() for t in inputs]
    found, torch_says, exact = attention(*inputs, backend=backend), explicit(*inputs), explicit(*exact_inputs)
    assert found.dtype == dtype
    # Other people's kernels: torch's CPU flash rounds its exponential to 20 bits. A lone key's gradients are zero, so errors
    # are held against the largest of the gradients.
    bits = max(torch.finfo(dtype).eps, 2.0**-19)
    assert error(found, exact) <= 2 * error(torch_says, exact) + bits * exact.abs().max()
    ours, torchs = (torch.autograd.grad(out, inputs, weight) for out in (found, torch_says))
    exacts = torch.autograd.grad(exact, exact_inputs, weight.double())
    scale = max(g.abs().max() for g in exacts)
    for one, two, three in zip(ours, torchs, exacts, strict=True):
        assert error(one, three) <= 2 * error(two, three) + bits * scale


def error(found, exact):
    return (found.double() - exact).abs().max()


def test_an_unknown_backend_is_named():
    with pytest.raises(InputError, match=r"must be one of auto, short, xformers, .* got 'flsh'"):
        attention(torch.zeros(1, 1, 3, 1, 8), backend="flsh")


def test_a_backend_that_cannot_work_says_why():
    assert "memory_efficient_attention" in why_not("xformers", "cpu", torch.float32, Shape(5, 5, 2, 64))
    assert why_not("math", "cpu", torch.float32, Shape(5, 5, 2, 64)) is None


def test_a_backend_with_a_known_fault_is_refused_by_name_and_never_chosen_by_auto(monkeypatch):
    """On a GPU that is described, because there may be none."""
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91500)
    with pytest.raises(
        InputError, match=r"cudnn cannot be used for 50 over 50 tokens.* cuDNN 9\.15\.0 reads .* newer than 9\.15\.0"
    ):
        resolve("cudnn", "cuda", torch.bfloat16, Shape(50, 50, 12, 64))
    assert resolve("cudnn", "cuda", torch.bfloat16, Shape(256, 128, 12, 64)) == "cudnn"
    assert "newer than 9.15.0" in why_not("cudnn", "cuda", torch.bfloat16, Shape(128, 197, 12, 64))
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91501)
    assert resolve("cudnn", "cuda", torch.bfloat16, Shape(50, 50, 12, 64)) == "cudnn"


@pytest.mark.parametrize("shape", [Shape(5, 321, 2, 64), Shape(321, 321, 2, 64), Shape(50, 50, 2, 129)])
def test_our_own_attention_names_its_limits_on_any_device(shape):
    for device in ("cpu", "cuda"):
        with pytest.raises(InputError, match=r"short cannot be used for .* at most 320 tokens, and heads of at most 128"):
            resolve("short", device, torch.bfloat16, shape)
        assert why_not("short", device, torch.bfloat16, shape).startswith("it takes at most 320 tokens")
    assert resolve("short", "cpu", torch.bfloat16, Shape(147, 320, 2, 128)) == "short"


def test_auto_is_torchs_own_choice_on_the_cpu():
    assert resolve("auto", "cpu", torch.float32, Shape(50, 50, 12, 64)) == "sdpa"


def test_xformers_is_called_inside_a_compiled_graph(monkeypatch):
    """With a stand-in for its operator, which does not exist on the CPU."""
    monkeypatch.setattr(backends, "_memory_efficient_attention", lambda q, k, v: q * 2)
    packed = torch.randn(1, 3, 3, 2, 8)
    compiled = torch.compile(lambda x: attention(x, backend="xformers"), fullgraph=True, backend="eager")
    assert torch.equal(compiled(packed), packed[:, :, 0] * 2)


def test_a_probe_under_inference_mode_is_right():
    with torch.inference_mode():
        assert why_not("math", "cpu", torch.float32, Shape(5, 5, 2, 48)) is None


def test_a_compiled_graph_has_a_dynamic_batch():
    compiled = torch.compile(attention, fullgraph=True, backend="eager", dynamic=True)
    for B in (3, 5):
        packed = torch.randn(B, 4, 3, 2, 8)
        torch.testing.assert_close(compiled(packed), attention(packed))


@pytest.mark.parametrize("backends", [("math", "math"), ("flash", "math"), ("math", "sdpa")])
def test_different_backends_compile_into_one_graph(backends, monkeypatch):
    """As where encoder and decoder find different ones fastest."""
    short, long = backends
    monkeypatch.setattr(
        "fastmae.model.attention.dot_product.fastest", lambda device, dtype, shape: short if shape.keys == 4 else long
    )
    monkeypatch.setattr("fastmae.model.attention.dot_product.MEASURED", ("cpu",))

    def both(x, y):
        return attention(x).sum() * attention(y).square().sum()

    def gradients(function, *inputs):
        return torch.autograd.grad(function(*inputs), inputs)

    x, y = torch.randn(2, 4, 3, 2, 8, requires_grad=True), torch.randn(2, 7, 3, 2, 8, requires_grad=True)
    found = gradients(torch.compile(both, fullgraph=True, backend="aot_eager"), x, y)
    exact = gradients(both, *(z.detach().double().requires_grad_() for z in (x, y)))
    for compiled, eager, truth in zip(found, gradients(both, x, y), exact, strict=True):
        assert_as_exact_as_torch(compiled, eager, truth)


def test_the_shapes_of_a_training_step_are_known_beforehand():
    assert attention_shapes(preset("huge"), 64, 192) == [(65, 65, 16, 80), (257, 257, 16, 32), (192, 257, 16, 32)]
    assert attention_shapes(preset("base", decoder_depth=1), 49, 147) == [(50, 50, 12, 64), (147, 197, 16, 32)]


def test_a_choice_outside_the_graph_is_marked_as_torchs_own_decorator_would():
    """Which is not used, because it imports torch's compiler."""

    def function():
        return "math"

    marked = vars(torch.compiler.assume_constant_result(function))
    assert marked and vars(attention_file._resolve_outside_graph) == marked
