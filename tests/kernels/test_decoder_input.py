"""decoder_input: rows where they belong, one rounding, and gradients that add in a fixed order."""

import pytest
import torch

from fastmae.kernels import decoder_input, decoder_input_ref
from fastmae.kernels.dispatch import INTERPRETED
from tests.support.exactness import assert_as_exact_as_torch
from tests.support.twins import twin

pytestmark = pytest.mark.worth(1)

SHAPES = [twin((1, 1, 1, 2, 8)), twin((2, 3, 5, 8, 20)), (3, 4, 6, 12, 33), (1, 5, 2, 9, 192)]  # B, K, Q, L, D
DTYPES = [  # x as the decoder's embedding leaves it, result
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float32),
]


def inputs(B, K, Q, L, D, dtype, device):
    ids = torch.rand(B, L).argsort(1).int().to(device)
    x = torch.randn(B, 1 + K, D, device=device).to(dtype)
    return x, torch.randn(D, device=device), torch.randn(1 + L, D, device=device), ids[:, :K], ids[:, K : K + Q]


@pytest.mark.parametrize(("x_dtype", "dtype"), DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_row_is_the_sum_of_its_two(shape, x_dtype, dtype, device):
    x, token, positions, ids_keep, ids_predict = inputs(*shape, x_dtype, device)
    out = decoder_input(x, token, positions, ids_keep, ids_predict, dtype)
    B, K, Q, _, _ = shape
    assert out.dtype == dtype
    for b in range(B):
        expected = [x[b, 0].float() + positions[0]]
        expected += [x[b, 1 + k].float() + positions[1 + int(ids_keep[b, k])] for k in range(K)]
        expected += [token + positions[1 + int(ids_predict[b, q])] for q in range(Q)]
        rounded = torch.stack(expected).to(dtype)
        if INTERPRETED and dtype == torch.bfloat16:  # the interpreter cuts where hardware rounds
            torch.testing.assert_close(out[b], rounded, rtol=2**-7, atol=0)
        else:
            assert torch.equal(out[b], rounded)


@pytest.mark.parametrize(("x_dtype", "dtype"), DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_are_the_rows_and_their_sum(shape, x_dtype, dtype, device):
    x, token, positions, ids_keep, ids_predict = inputs(*shape, x_dtype, device)
    x.requires_grad_()
    token.requires_grad_()
    out = decoder_input(x, token, positions, ids_keep, ids_predict, dtype)
    weight = torch.randn(out.shape, device=device).to(dtype)
    out.backward(weight)
    rows = x.shape[1]
    if INTERPRETED and x_dtype != weight.dtype:
        torch.testing.assert_close(x.grad, weight[:, :rows].to(x_dtype), rtol=2**-7, atol=0)
    else:
        assert torch.equal(x.grad, weight[:, :rows].to(x_dtype))
    exact, torch_says = weight[:, rows:].double().sum((0, 1)), weight[:, rows:].float().sum((0, 1))
    # Terms cancel, so errors are held against the sum of their magnitudes.
    scale = weight[:, rows:].double().abs().sum((0, 1)).max()
    error = (token.grad.double() - exact).abs().max()
    assert error <= 2 * (torch_says.double() - exact).abs().max() + torch.finfo(torch.float32).eps * scale


def test_gradients_are_made_in_the_dtypes_asked_for(device):
    """Of the op itself: autograd would silently convert another dtype, after it has taken its memory."""
    grad = torch.randn(2, 8, 33, device=device)
    for x_dtype, token_dtype in ((torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)):
        found = torch.ops.fastmae.decoder_input_bwd(grad, 4, x_dtype, token_dtype)
        assert [gradient.dtype for gradient in found] == [x_dtype, token_dtype]


def test_the_same_gradient_comes_twice(device):
    grads = []
    x, token, positions, ids_keep, ids_predict = inputs(3, 4, 8, 12, 33, torch.float32, device)
    weight = torch.randn(3, 13, 33, device=device)
    for _ in range(2):
        token = token.detach().requires_grad_()
        decoder_input(x, token, positions, ids_keep, ids_predict).backward(weight)
        grads.append(token.grad)
    assert torch.equal(*grads)


def test_float64_gradients_pass_gradcheck():
    x, token, positions, ids_keep, ids_predict = inputs(2, 3, 4, 7, 5, torch.float64, "cpu")
    x, token = x.requires_grad_(), token.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, t: decoder_input(x, t, positions.double(), ids_keep, ids_predict), (x, token))


def test_the_result_promotes_as_addition_does(device):
    arguments = inputs(2, 3, 4, 7, 5, torch.bfloat16, device)
    out = decoder_input(*arguments)
    assert out.dtype == torch.float32
    assert_as_exact_as_torch(out, decoder_input_ref(*arguments, torch.float32), decoder_input_ref(*arguments, torch.float64))


def test_non_contiguous_inputs_are_read_rightly(device):
    x, token, positions, ids_keep, ids_predict = inputs(2, 3, 4, 7, 6, torch.float32, device)
    strided = (x.mT.contiguous().mT, torch.stack([token, token], 1)[:, 0], positions.T.contiguous().T)
    expected = decoder_input(x, token, positions, ids_keep, ids_predict)
    assert torch.equal(decoder_input(*strided, ids_keep.T.contiguous().T, ids_predict), expected)


@pytest.mark.twin
def test_op_passes_opcheck(device):
    x, token, positions, ids_keep, ids_predict = inputs(2, 3, 4, 7, 5, torch.float32, device)
    arguments = (x.requires_grad_(), token.requires_grad_(), positions, ids_keep, ids_predict, torch.float32)
    torch.library.opcheck(torch.ops.fastmae.decoder_input.default, arguments)
    gradient = torch.randn(2, 8, 5, device=device)
    for dtype in (torch.float32, torch.bfloat16):
        torch.library.opcheck(torch.ops.fastmae.decoder_input_bwd.default, (gradient, 4, dtype, torch.float32))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 3)}, r"x must be \(B, 1 \+ K, D\)"),
        ({"mask_token": torch.zeros(3)}, r"mask_token must be \(5,\)"),
        ({"positions": torch.zeros(8, 4)}, r"positions \(1 \+ L, 5\), got \(5,\) and \(8, 4\)"),
        ({"positions": torch.zeros(8, 5, requires_grad=True)}, "no gradient for positions"),
        ({"ids_keep": torch.zeros(2, 3)}, r"ids_keep must be int32 \(2, 3\)"),
        ({"ids_predict": torch.zeros(1, 4, dtype=torch.int32)}, r"ids_predict must be int32 \(2, Q\)"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    names = ("x", "mask_token", "positions", "ids_keep", "ids_predict")
    good = dict(zip(names, inputs(2, 3, 4, 7, 5, torch.float32, "cpu"), strict=True))
    with pytest.raises(ValueError, match=message):
        decoder_input(**{**good, **change})
