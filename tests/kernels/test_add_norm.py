"""add_norm: the residual sum, its LayerNorm and all their gradients against float64, in every pair of dtypes."""

import importlib

import pytest
import torch
import torch.nn.functional as F

from fastmae.kernels import add_norm, add_norm_ref
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


@pytest.mark.parametrize("shape", [(3, 5, 33), twin((7, 768))])
def test_without_a_branch_the_sum_is_x_itself(shape, device):
    x, _, weight, bias, _ = inputs(shape, torch.float32, torch.float32, device)
    total, _ = add_norm(x, None, weight, bias, EPS)
    assert total.data_ptr() == x.data_ptr() and torch.equal(total, x)
    assert_exact((x, None, weight, bias, None), torch.bfloat16, gradients_of_outputs(shape, device))


def test_a_program_of_the_gradient_takes_many_tiles_of_rows(device, monkeypatch):
    """As on a GPU, where rows are many more than programs."""
    monkeypatch.setattr(importlib.import_module("fastmae.kernels.add_norm"), "_BWD_WARPS", 3)
    shape = (130, 11) if device == "cpu" else (5000, 11)
    assert_exact(inputs(shape, torch.float32, torch.float32, device), torch.float32, gradients_of_outputs(shape, device))


@pytest.mark.parametrize(("scale", "offset"), [(1, 3000), (1e-3, 0), (0, 1)], ids=["far from zero", "small", "flat"])
def test_rows_of_any_scale_are_normalised_exactly(scale, offset, device):
    """The mean of squares less the square of the mean would lose a variance far from zero; of a small one, eps is a part."""
    x, branch, *rest = inputs((6, 48), torch.float32, torch.float32, device)
    x, branch = ((scale * t.detach()).requires_grad_() for t in (x, branch))
    x = (x.detach() + offset).requires_grad_()
    assert_exact((x, branch, *rest), torch.float32, gradients_of_outputs((6, 48), device))


@pytest.mark.parametrize("used", [0, 1])
def test_an_output_that_is_not_used_has_no_part_in_gradients(used, device):
    tensors = inputs((4, 20), torch.float32, torch.bfloat16, device)
    weight = gradients_of_outputs((4, 20), device)[0]
    *four, branch_bias = tensors
    loss = (add_norm(*four, EPS, branch_bias)[used] * weight).sum()
    expected = (in_torch(*tensors, torch.float32)[used] * weight).sum()
    found = torch.autograd.grad(loss, tensors)
    for one, two in zip(found, torch.autograd.grad(expected, tensors, allow_unused=True), strict=True):
        torch.testing.assert_close(one, torch.zeros_like(one) if two is None else two, rtol=2**-7, atol=1e-5)


def test_a_sum_that_will_not_be_used_has_no_gradient(device):
    tensors = inputs((4, 20), torch.float32, torch.bfloat16, device)
    *four, branch_bias = tensors
    results = [add_norm(*four, EPS, branch_bias, use_sum=use_sum) for use_sum in (True, False)]
    assert torch.equal(results[0][0], results[1][0]) and not results[1][0].requires_grad
    pairs = zip(*(torch.autograd.grad(normed.square().sum(), tensors) for _, normed in results), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)


@pytest.mark.twin
@pytest.mark.parametrize("is_compiled", [False, True], ids=["eager", "compiled"])
def test_the_gradient_of_a_sum_that_is_not_used_is_not_read(is_compiled, device, monkeypatch):
    """It would be zeros: a pass to write, and one to read. A compiled graph must be told."""
    module, given = importlib.import_module("fastmae.kernels.add_norm"), []
    twin_of_gradient = module.add_norm_bwd_ref

    def recorded(grad_normed, grad_sum, *rest):
        given.append(grad_sum)
        return twin_of_gradient(grad_normed, grad_sum, *rest)

    def loss(x, branch, weight, bias, branch_bias):
        return add_norm(x, branch, weight, bias, EPS, branch_bias, use_sum=not is_compiled)[1].square().sum()

    monkeypatch.setattr(module, "add_norm_bwd_ref", recorded)
    monkeypatch.setenv("FASTMAE_KERNELS", "torch")
    function = torch.compile(loss, fullgraph=True, backend="aot_eager") if is_compiled else loss
    function(*inputs((4, 20), torch.float32, torch.bfloat16, device)).backward()
    assert given == [None]


@pytest.mark.parametrize("dtype", [torch.float32, twin(torch.bfloat16)])
def test_x_and_a_branch_of_its_dtype_share_their_gradient(dtype, device):
    x, branch, weight, bias, _ = inputs((4, 20), dtype, dtype, device)
    total, normed = add_norm(x, branch, weight, bias, EPS)
    one, two = torch.autograd.grad(total.sum() + normed.square().sum(), (x, branch))
    assert one.data_ptr() == two.data_ptr()


def test_the_branchs_gradient_is_made_in_its_dtype(device):
    """Of the op itself: autograd would silently convert another dtype, after it has taken its memory."""
    grad, rows = torch.randn(4, 20, device=device), torch.rand(2, 4, device=device)
    arguments = (grad.bfloat16(), grad, grad, grad[0], rows[0], rows[1])
    found = torch.ops.fastmae.add_norm_bwd(*arguments, torch.bfloat16, 3)
    assert [t.dtype for t in found] == [torch.float32, torch.bfloat16, torch.float32]
    torch.testing.assert_close(found[1].float(), found[0], rtol=2**-7, atol=0)
    assert torch.ops.fastmae.add_norm_bwd(*arguments, torch.float32, 3)[1].numel() == 0  # x's serves


def test_the_branchs_bias_is_not_read_and_gradients_have_the_dtypes_of_parameters(device):
    """As under FSDP with parameters in bfloat16."""
    x, branch, *parameters = inputs((4, 20), torch.float32, torch.bfloat16, device)
    weight, bias, branch_bias = (p.detach().bfloat16().requires_grad_() for p in parameters)
    outputs = add_norm(x, branch, weight, bias, EPS, torch.full_like(branch_bias, torch.nan).requires_grad_())
    assert all(torch.equal(*pair) for pair in zip(outputs, add_norm(x, branch, weight, bias, EPS), strict=True))
    sum(o.square().sum() for o in add_norm(x, branch, weight, bias, EPS, branch_bias)).backward()
    assert weight.grad.dtype == bias.grad.dtype == branch_bias.grad.dtype == torch.bfloat16


def test_two_runs_give_equal_bits(device):
    tensors = inputs((20, 33), torch.float32, torch.bfloat16, device)
    weights = gradients_of_outputs((20, 33), device)
    runs = [add_norm(*tensors[:4], EPS, tensors[4], torch.bfloat16) for _ in range(2)]
    pairs = zip(*((*outputs, *gradients(outputs, tensors, weights)) for outputs in runs), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)


def test_non_contiguous_inputs_are_read_rightly(device):
    tensors = inputs((4, 6, 20), torch.float32, torch.bfloat16, device, requires_grad=False)
    weights = gradients_of_outputs((4, 6, 20), device)
    x, branch, weight, bias, branch_bias = tensors
    strided = (x.mT.contiguous().mT, branch.transpose(0, 1).contiguous().transpose(0, 1), *(
        torch.stack([p, p], 1)[:, 0] for p in (weight, bias, branch_bias)))  # fmt: skip
    found = []
    for given, outer in ((tensors, weights), (strided, weights.mT.contiguous().mT)):
        leaves = [t.detach().requires_grad_() for t in given]
        outputs = add_norm(*leaves[:4], EPS, leaves[4])
        found.append((*outputs, *torch.autograd.grad(outputs, leaves, outer.unbind(0))))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
    assert torch.equal(add_norm(strided[0], None, weight, bias, EPS)[1], add_norm(x, None, weight, bias, EPS)[1])


def test_no_rows_give_no_gradients(device):
    tensors = inputs((0, 20), torch.float32, torch.bfloat16, device)
    outputs = add_norm(*tensors[:4], EPS, tensors[4])
    assert all(o.shape == (0, 20) for o in outputs)
    assert all(g.abs().sum() == 0 for g in gradients(outputs, tensors, torch.zeros(2, 0, 20, device=device)))


def test_float64_gradients_pass_gradcheck():
    x, branch, weight, bias, branch_bias = (t.detach().double().requires_grad_() for t in
                                            inputs((2, 3, 5), torch.float64, torch.float64, "cpu"))  # fmt: skip
    assert torch.autograd.gradcheck(lambda x, *t: add_norm(x, None, *t, EPS), (x, weight, bias))
    assert torch.autograd.gradcheck(lambda *t: add_norm(*t, EPS), (x, branch, weight, bias))
    outputs = add_norm(x, branch, weight, bias, EPS, branch_bias)
    given = gradients_of_outputs((2, 3, 5), "cpu")
    grad_branch, grad_branch_bias = gradients(outputs, (branch, branch_bias), given)
    torch.testing.assert_close(grad_branch_bias, grad_branch.sum((0, 1)))


@pytest.mark.twin
@pytest.mark.parametrize("has_branch", [False, True])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.all)])
def test_it_compiles_into_one_graph(backend, has_branch, device):
    """With gradients as in eager mode; a loss that does not use the sum included."""
    tensors = inputs((3, 5, 20), torch.float32, torch.bfloat16, device)
    weights = gradients_of_outputs((3, 5, 20), device)
    used = [0, 2, 3] if not has_branch else range(5)

    def step(x, branch, weight, bias, branch_bias):
        branch, branch_bias = (branch, branch_bias) if has_branch else (None, None)
        total, normed = add_norm(x, branch, weight, bias, EPS, branch_bias, torch.bfloat16)
        _, last = add_norm(total, branch, weight, bias, EPS, branch_bias, use_sum=False)
        return normed.float(), last

    compiled = torch.compile(step, fullgraph=True, backend=backend)
    leaves = [tensors[i] for i in used]
    for one, two in zip(*((*o, *gradients(o, leaves, weights)) for o in (compiled(*tensors), step(*tensors))), strict=True):
        torch.testing.assert_close(one, two, rtol=2**-7 if one.dtype == torch.bfloat16 else 1e-5, atol=1e-4)


@pytest.mark.twin
def test_ops_pass_opcheck(device):
    x, branch, weight, bias, _ = inputs((3, 5, 20), torch.float32, torch.bfloat16, device, requires_grad=False)
    strided, ops = x.mT.contiguous().mT, torch.ops.fastmae
    torch.library.opcheck(ops.add_norm.default, (strided, branch, weight, bias, EPS, torch.bfloat16))
    total, normed, *statistics = add_norm_ref(x, branch, weight, bias, EPS, torch.bfloat16)
    torch.library.opcheck(ops.add_norm_bwd.default, (normed, strided, total, weight, *statistics, torch.bfloat16, 3))
    fake = ("test_schema", "test_faketensor")  # the rest is the same for other shapes of the results
    torch.library.opcheck(ops.add_norm.default, (x, None, weight, bias, EPS, torch.float32), test_utils=fake)
    torch.library.opcheck(
        ops.add_norm_bwd.default, (normed, None, total, weight, *statistics, torch.float32, 2), test_utils=fake
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(())}, r"x must be floating point \(..., D\), got torch.float32 \(\)"),
        ({"x": torch.zeros(2, 5).int()}, "got torch.int32"),
        ({"branch": torch.zeros(5)}, r"branch must be floating point \(2, 5\), as x is, got torch.float32 \(5,\)"),
        ({"branch": None}, "branch_bias needs a branch"),
        ({"weight": torch.zeros(4)}, r"weight must be floating point \(5,\)"),
        ({"bias": torch.zeros(5).int()}, r"bias must be floating point \(5,\), got torch.int32"),
        ({"branch_bias": torch.zeros(1, 5)}, r"branch_bias must be floating point \(5,\)"),
        ({"bias": torch.zeros(5, device="meta")}, "on the device of x, cpu"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    names = ("x", "branch", "weight", "bias", "branch_bias")
    good = dict(zip(names, inputs((2, 5), torch.float32, torch.float32, "cpu"), strict=True))
    with pytest.raises(ValueError, match=message):
        add_norm(**{**good, **change}, eps=EPS)
