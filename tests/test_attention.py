"""Every attention backend gives the same values and gradients; choosing one by name or by probe is clear."""

import pytest
import torch

from fastmae.attention import BACKENDS, attention, resolve, why_not
from fastmae.errors import InputError
from tests.exactness import assert_as_exact_as_torch

SHAPES = [(2, 50, 50, 3, 64), (1, 65, 65, 2, 80), (2, 7, 23, 2, 32), (1, 1, 1, 1, 32)]  # B, N, M, H, d


def explicit(q, k, v):
    weights = torch.einsum("bnhd,bmhd->bhnm", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("bhnm,bmhd->bnhd", weights.softmax(-1), v)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_are_as_exact_as_the_formula_in_torch(shape, backend, device):
    B, N, M, H, d = shape
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    if reason := why_not(backend, device, dtype, d):
        pytest.skip(f"{backend} does not work here: {reason[:60]}")
    q, k, v = (torch.randn(B, n, H, d, device=device, dtype=dtype, requires_grad=True) for n in (N, M, M))
    weight = torch.randn(B, N, H, d, device=device, dtype=dtype)
    exact_inputs = [t.detach().double().requires_grad_() for t in (q, k, v)]
    found, torch_says, exact = attention(q, k, v, backend), explicit(q, k, v), explicit(*exact_inputs)
    assert_as_exact_as_torch(found.detach(), torch_says.detach(), exact.detach())
    gradients = (torch.autograd.grad(out, inputs, weight.to(out.dtype))
                 for out, inputs in ((found, (q, k, v)), (torch_says, (q, k, v)), (exact, exact_inputs)))  # fmt: skip
    for one, two, three in zip(*gradients, strict=True):
        assert_as_exact_as_torch(one, two, three)


def test_an_unknown_backend_is_named():
    q = torch.zeros(1, 1, 1, 8)
    with pytest.raises(InputError, match=r"must be one of auto, xformers, .* got 'flsh'"):
        attention(q, q, q, "flsh")


def test_a_backend_that_cannot_work_says_why():
    assert "memory_efficient_attention" in why_not("xformers", "cpu", torch.float32, 64)
    assert why_not("math", "cpu", torch.float32, 64) is None


def test_auto_is_torchs_own_choice_on_the_cpu():
    assert resolve("cpu", torch.float32, 64) == "sdpa"


@pytest.mark.gpu
def test_auto_is_xformers_on_cuda_where_it_works():
    expected = "sdpa" if why_not("xformers", "cuda", torch.bfloat16, 64) else "xformers"
    assert resolve("cuda", torch.bfloat16, 64) == expected
