"""short_attention: values and gradients against float64, on every division of tokens into tiles."""

import pytest
import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastmae.kernels import short_attention
from fastmae.kernels.attention_tiles import backward_tiles, dense, forward_tiles, is_single, padded_flops
from fastmae.kernels.dispatch import INTERPRETED
from tests.support.exactness import assert_as_exact_as_torch
from tests.support.twins import twin

pytestmark = pytest.mark.worth(1)

# The interpreter's products of bf16 are wrong, and those of fp16 are added up in fp16.
DTYPES = [torch.float32] if INTERPRETED else [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [  # images, queries (None: those of packed), keys, heads, channels
    (2, None, 21, 2, 24),  # one tile
    (1, None, 70, 1, 8),  # two blocks of rows and a smaller one, in fp32
    twin((1, 5, 70, 2, 80)),
    twin((3, 37, 9, 1, 6)),
    twin((1, None, 1, 2, 1)),
    twin((2, None, 50, 2, 64)),
    twin((1, None, 65, 2, 80)),
    twin((1, None, 197, 1, 32)),
    twin((1, 147, 197, 1, 32)),
    twin((1, 192, 257, 1, 32)),
    twin((1, 33, 320, 1, 128)),
]  # fmt: skip


def inputs(shape, dtype, device, has_keys=False):
    """packed, q or None, bias, keys or None; and a gradient of the result."""
    B, N, M, H, d = shape
    packed = torch.randn(B, M, 3 if N is None else 2, H, d, device=device).to(dtype).requires_grad_()
    q = None if N is None else torch.randn(B, N, H, d, device=device).to(dtype).requires_grad_()
    keys = torch.randint(1, M + 1, (B,), dtype=torch.int32, device=device) if has_keys else None
    grad = torch.randn(B, N or M, H, d, device=device).to(dtype)
    return (packed, q, torch.zeros(3 * H * d, device=device, requires_grad=True), keys), grad


def torch_in(dtype, packed, q, keys, grad):
    """The result, and gradients of packed, q (or None) and bias, by torch's own attention in ``dtype``."""
    packed, q = (None if x is None else x.detach().to(dtype).requires_grad_() for x in (packed, q))
    parts = [x.transpose(1, 2) for x in (packed.unbind(2) if q is None else (q, *packed.unbind(2)))]
    mask = None if keys is None else (torch.arange(packed.shape[1], device=keys.device) < keys[:, None])[:, None, None]
    with sdpa_kernel(SDPBackend.MATH):
        out = functional.scaled_dot_product_attention(*parts, attn_mask=mask).transpose(1, 2)
    out.backward(grad.to(dtype))
    sums = [x.grad.sum((0, 1)).flatten() for x in (q, packed) if x is not None]
    return out.detach(), packed.grad, None if q is None else q.grad, torch.cat(sums)


def run(arguments, grad):
    """The same by short_attention."""
    out = short_attention(*arguments)
    leaves = [x for x in arguments[:3] if x is not None]
    grads = iter(torch.autograd.grad(out, leaves, grad))
    return out.detach(), *(None if x is None else next(grads) for x in arguments[:3])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("has_keys", [False, True], ids=["all", "keys"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients_are_as_exact_as_torchs(shape, has_keys, dtype, device):
    arguments, grad = inputs(shape, dtype, device, has_keys)
    packed, q, _, keys = arguments
    found = run(arguments, grad)
    torch_says, exact = (torch_in(t, packed, q, keys, grad) for t in (dtype, torch.float64))
    assert found[3].dtype == torch.float32  # of the bias
    for one, own, true in zip((*found[:3], found[3].to(dtype)), torch_says, exact, strict=True):
        assert (one is None) == (own is None)
        if one is not None:
            assert_as_exact_as_torch(one, own, true)


def test_the_gradient_of_bias_is_that_of_adding_it(device):
    (packed, _, bias, _), grad = inputs((2, None, 9, 2, 6), torch.float32, device)
    found = run((packed, None, bias, None), grad)
    shifted = (packed.detach().double() + bias.detach().double().view(3, 2, 6)).requires_grad_()
    exact = torch_in(torch.float64, shifted, None, None, grad)[3]
    torch.testing.assert_close(found[3].double(), exact, rtol=1e-5, atol=1e-5)
    assert not found[3].view(3, -1)[1].any()  # of k's: a shift of all scores of a query


@pytest.mark.parametrize("M", [20, twin(70)])
def test_missing_keys_are_not_read_and_their_gradients_are_zero(M, device):
    (packed, _, bias, _), grad = inputs((2, None, M, 1, 8), torch.float32, device)
    keys = torch.tensor([1, M - 3], dtype=torch.int32, device=device)
    spoiled = packed.detach().clone()
    for b in range(2):
        spoiled[b, keys[b] :, 1:] = torch.nan
    found, expected = (run((x.detach().requires_grad_(), None, bias, keys), grad) for x in (spoiled, packed))
    for b in range(2):
        assert not found[1][b, keys[b] :, 1:].any()
    torch.testing.assert_close(found[0][0], packed[0, :1, 2].expand(M, -1, -1).detach())  # of one key: its value
    assert all(
        torch.equal(one, two)
        for one, two in zip((found[0], found[1], found[3]), (expected[0], expected[1], expected[3]), strict=True)
    )


def test_strided_inputs_give_the_same_bits(device):
    (packed, q, bias, _), grad = inputs((2, 6, 7, 2, 8), torch.float32, device)
    wide = torch.randn(2, 14, 2, 2, 8, device=device)
    wide[:, ::2] = packed.detach()
    views = [
        (wide[:, ::2].requires_grad_(), q.detach().transpose(1, 3).contiguous().transpose(1, 3).requires_grad_()),
        (packed.detach().transpose(2, 4).contiguous().transpose(2, 4).requires_grad_(), q),
    ]
    keys = torch.tensor([[3, 1], [7, 2]], dtype=torch.int32, device=device)[:, 0]
    expected = run((packed, q, bias, keys.contiguous()), grad)
    for view in views:
        found = run((*view, bias, keys), grad.transpose(1, 2).contiguous().transpose(1, 2))
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_tokens_are_brought_within_reach_of_32_bits():
    far = torch.empty_strided((4, 9, 3, 2, 8), (48, 2**28, 16, 8, 1), device="meta")  # tokens first, and many images
    assert dense(far).is_contiguous() and dense(far[:, :7]).stride() == far.stride()


def test_autocast_changes_nothing(device):
    arguments, grad = inputs((2, 5, 9, 2, 8), torch.float32, device)
    expected = run(arguments, grad)
    with torch.autocast(device, torch.bfloat16):
        found = run(arguments, grad)
        lse = torch.ops.fastmae.short_attention(*arguments)[1]
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True)) and lse.dtype == torch.float32


@pytest.mark.parametrize("M", [33, twin(70)])
def test_two_runs_give_equal_bits(M, device):
    arguments, grad = inputs((2, None, M, 1, 8), torch.float32, device, has_keys=True)
    assert all(
        torch.equal(*pair) for pair in zip(*((x for x in run(arguments, grad) if x is not None) for _ in range(2)), strict=True)
    )


@pytest.mark.parametrize(("N", "keys"), [(None, None), (3, [2, 5])])
def test_float64_gradients_pass_gradcheck(N, keys):
    B, M, H, d = 2, 5, 2, 3
    packed = torch.randn(B, M, 3 if N is None else 2, H, d, dtype=torch.float64, requires_grad=True)
    q = None if N is None else torch.randn(B, N, H, d, dtype=torch.float64, requires_grad=True)
    keys = None if keys is None else torch.tensor(keys, dtype=torch.int32)
    leaves = [x for x in (packed, q) if x is not None]
    assert torch.autograd.gradcheck(lambda packed, q=None: short_attention(packed, q, None, keys), leaves)


def test_bias_is_no_part_of_the_result_and_keeps_its_dtype(device):
    (packed, _, _, _), grad = inputs((1, None, 6, 1, 4), torch.float32, device)
    bias = torch.full((12,), torch.nan, dtype=torch.bfloat16, device=device, requires_grad=True)
    found = run((packed, None, bias, None), grad)
    assert found[3].dtype == torch.bfloat16 and all(x.isfinite().all() for x in found if x is not None)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.all)])
def test_a_linear_layer_whose_bias_gets_its_gradient_here_compiles_into_one_graph(backend, device):
    x, weight = torch.randn(3, 5, 12, device=device), torch.randn(36, 12, device=device)
    bias = torch.randn(36, device=device)

    def by_kernel(x, weight, bias):
        packed = functional.linear(x, weight, bias.detach())
        return short_attention(packed.view(x.shape[0], x.shape[1], 3, 2, 6), None, bias).flatten(2)

    def plain(x, weight, bias):
        q, k, v = functional.linear(x, weight, bias).view(x.shape[0], x.shape[1], 3, 2, 6).permute(2, 0, 3, 1, 4)
        return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    results = []
    for function in (plain, by_kernel, torch.compile(by_kernel, fullgraph=True, backend=backend)):
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        out = function(*leaves)
        results.append(
            [out.detach(), *torch.autograd.grad(out, leaves, torch.linspace(-1, 1, out.numel(), device=device).view_as(out))]
        )
    for found in results[1:]:
        torch.testing.assert_close(found, results[0], rtol=1e-4, atol=1e-4)


@pytest.mark.twin
@pytest.mark.parametrize("N", [None, 4])
def test_ops_pass_opcheck(N, device):
    (packed, q, bias, keys), grad = inputs((2, N, 5, 2, 8), torch.float32, device, has_keys=True)
    torch.library.opcheck(torch.ops.fastmae.short_attention.default, (packed, q, bias, keys))
    packed, q = packed.detach(), None if q is None else q.detach()
    out, lse = torch.ops.fastmae.short_attention(packed, q, None, keys)
    for wants_bias in (False, True):
        torch.library.opcheck(torch.ops.fastmae.short_attention_bwd.default, (grad, packed, q, keys, out, lse, wants_bias))


def test_no_images_give_no_rows(device):
    arguments, grad = inputs((0, None, 5, 2, 4), torch.float32, device)
    found = run(arguments, grad)
    assert found[0].shape == (0, 5, 2, 4) and not found[3].any()


def test_wrong_arguments_are_named():
    packed = torch.zeros(2, 5, 3, 2, 8)
    for wrong, message in [
        ((packed[:, :, :2],), r"packed must be floating point \(B, M, 3, H, d\) without q, got .* \(2, 5, 2, 2, 8\)"),
        ((packed, packed[:, :, 0]), r"\(B, M, 2, H, d\) with q"),
        ((packed.int(),), "packed must be floating point"),
        ((packed[:, :, 1:], packed[:, :, 0].double()), r"q must be torch.float32 \(2, N, 2, 8\), got torch.float64"),
        ((packed, None, torch.zeros(32)), r"bias must be floating point \(48,\), got torch.float32 \(32,\)"),
        ((packed, None, None, torch.zeros(2)), r"keys must be int32 \(2,\), got torch.float32"),
        ((torch.zeros(1, 321, 3, 1, 8),), "1 to 320 tokens .* got 321 queries, 321 keys, 8 channels: use another backend"),
        ((torch.zeros(1, 5, 3, 1, 129),), "128 channels"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            short_attention(*wrong)


@pytest.mark.parametrize("itemsize", [2, 4])
def test_tiles_cover_all_tokens_and_waste_little(itemsize):
    for N in range(1, 321):
        for d in (8, 32, 64, 80, 128):
            for tiles in (forward_tiles(N, N, d, itemsize), backward_tiles(N, N, d, itemsize)):
                rows = tiles.blocks * tiles.rows + tiles.tail
                assert N <= rows < max(2 * N, 17) and (tiles.tail == 0 or rows - tiles.tail < N)
    share = {N: forward_tiles(N, N, 32, 2).padded(N) / N**2 for N in (197, 257)}
    assert share[197] < 1.21 and share[257] < 1.2 and is_single(50, 50, 64) and not is_single(50, 65, 64)
    assert padded_flops(50, 50, 64) == (2 * 2 * 64**3, 5 * 2 * 64**3)
    assert padded_flops(197, 197, 32) == (2 * 2 * 32 * 208 * 224, 7 * 2 * 32 * 208 * 224)
