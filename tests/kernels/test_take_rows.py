"""take_rows: the shuffle, the unshuffle and their gradients, bit for bit."""

import pytest
import torch

from fastmae.kernels import take_rows, take_rows_ref
from fastmae.kernels.take_rows import sum_holes_ref
from tests.support.twins import twin

pytestmark = pytest.mark.worth(1)

SHAPES = [twin(1, 1, 1, 2), twin(2, 3, 7, 5), (3, 4, 12, 33), (1, 5, 9, 192)]  # B, K, L, D
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def indices(B, K, L, device):
    ids_shuffle = torch.rand(B, L).argsort(1)
    return ids_shuffle[:, :K].int().to(device), ids_shuffle.argsort(1).int().to(device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("B", "K", "L", "D"), SHAPES)
def test_shuffle_takes_the_rows_that_a_loop_takes(B, K, L, D, dtype, device):
    ids_keep, ids_restore = indices(B, K, L, device)
    x = torch.randn(B, L, D, device=device).to(dtype)
    out = take_rows(x, ids_keep, ids_restore)
    expected = torch.stack([torch.stack([x[b, int(i)] for i in ids_keep[b]]) for b in range(B)])
    assert torch.equal(out, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("B", "K", "L", "D"), SHAPES)
def test_unshuffle_puts_rows_back_and_fills_the_holes(B, K, L, D, dtype, device):
    ids_keep, ids_restore = indices(B, K, L, device)
    x, fill = torch.randn(B, K, D, device=device).to(dtype), torch.randn(D, device=device).to(dtype)
    out = take_rows(x, ids_restore, ids_keep, fill)
    for b in range(B):
        for position in range(L):
            source = int(ids_restore[b, position])
            assert torch.equal(out[b, position], x[b, source] if source < K else fill)


@pytest.mark.parametrize(("B", "K", "L", "D"), SHAPES)
def test_unshuffling_a_shuffle_gives_back_the_kept_rows(B, K, L, D, device):
    ids_keep, ids_restore = indices(B, K, L, device)
    x = torch.randn(B, L, D, device=device)
    back = take_rows(take_rows(x, ids_keep, ids_restore), ids_restore, ids_keep)
    is_kept = (ids_restore < K)[..., None]
    assert torch.equal(back, torch.where(is_kept, x, 0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("B", "K", "L", "D"), SHAPES)
def test_gradients_equal_those_of_indexing(B, K, L, D, dtype, device):
    ids_keep, ids_restore = indices(B, K, L, device)
    x = torch.randn(B, K, D, device=device).to(dtype).requires_grad_()
    fill = torch.randn(D, device=device).to(dtype).requires_grad_()
    weight = torch.randn(B, L, D, device=device).to(dtype)
    (take_rows(x, ids_restore, ids_keep, fill) * weight).sum().backward()
    is_hole = (ids_restore >= K)[..., None]
    expected = torch.stack([weight[b][ids_keep[b].long()] for b in range(B)])
    assert torch.equal(x.grad, expected)
    exact = torch.where(is_hole, weight.double(), 0).sum((0, 1))
    torch_says = torch.where(is_hole, weight, 0).sum((0, 1))
    error = (fill.grad.double() - exact).abs().max()
    # Sums are compared up to their own magnitude: terms cancel.
    scale = torch.where(is_hole, weight.double(), 0).abs().sum((0, 1)).max()
    assert error <= 2 * (torch_says.double() - exact).abs().max() + torch.finfo(dtype).eps * scale


def test_float64_gradients_pass_gradcheck():
    ids_keep, ids_restore = indices(2, 3, 7, "cpu")
    x, fill = (
        torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True),
        torch.randn(5, dtype=torch.float64, requires_grad=True),
    )
    assert torch.autograd.gradcheck(lambda x, f: take_rows(x, ids_restore, ids_keep, f), (x, fill))


def test_mixed_dtypes_promote_as_concatenation_does(device):
    ids_keep, ids_restore = indices(2, 3, 7, device)
    x, fill = torch.randn(2, 3, 4, device=device, dtype=torch.bfloat16), torch.randn(4, device=device)
    out = take_rows(x, ids_restore, ids_keep, fill)
    assert out.dtype == torch.float32
    assert torch.equal(out, take_rows_ref(x.float(), ids_restore, ids_keep, fill))


def test_non_contiguous_rows_are_taken_rightly(device):
    ids_keep, ids_restore = indices(2, 3, 7, device)
    x = torch.randn(2, 4, 7, device=device).transpose(1, 2)
    assert torch.equal(take_rows(x, ids_keep, ids_restore), take_rows(x.contiguous(), ids_keep, ids_restore))


@pytest.mark.twin
def test_op_passes_opcheck(device):
    ids_keep, ids_restore = indices(2, 3, 7, device)
    x, fill = torch.randn(2, 3, 4, device=device, requires_grad=True), torch.randn(4, device=device, requires_grad=True)
    torch.library.opcheck(torch.ops.fastmae.take_rows.default, (x, ids_restore, ids_keep, fill))
    torch.library.opcheck(torch.ops.fastmae.take_rows.default, (x, ids_restore, ids_keep, None))
    torch.library.opcheck(torch.ops.fastmae.sum_holes.default, (torch.randn(2, 7, 4, device=device), ids_restore, 3))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_fills_gradient_is_made_in_the_dtype_of_what_comes_back(dtype, device):
    """Of the op itself: autograd would silently convert another dtype, after it has taken its memory."""
    _, ids_restore = indices(2, 3, 7, device)
    assert torch.ops.fastmae.sum_holes(torch.randn(2, 7, 4, device=device).to(dtype), ids_restore, 3).dtype == dtype


def test_fill_gradient_of_no_holes_is_zero():
    assert torch.equal(sum_holes_ref(torch.randn(2, 3, 4), torch.zeros(2, 3, dtype=torch.int32), 3), torch.zeros(4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 3)}, r"x must be \(B, N, D\)"),
        ({"ids": torch.zeros(2, 7)}, r"ids must be int32 \(2, M\)"),
        ({"inverse": torch.zeros(2, 4, dtype=torch.int32)}, r"inverse must be int32 \(2, 3\)"),
        ({"fill": torch.zeros(5)}, r"fill must be \(4,\)"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    good = {"x": torch.zeros(2, 3, 4), "ids": torch.zeros(2, 7, dtype=torch.int32),
            "inverse": torch.zeros(2, 3, dtype=torch.int32), "fill": torch.zeros(4)}  # fmt: skip
    with pytest.raises(ValueError, match=message):
        take_rows(**{**good, **change})
