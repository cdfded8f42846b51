"""masked_mse: the loss and its gradient against float64, with targets that are never stored."""

import pytest
import torch

from fastmae.kernels import masked_mse
from tests.support.exactness import assert_as_exact_as_torch
from tests.support.patches import SHAPES, inputs

pytestmark = pytest.mark.worth(1)


def loss_in(dtype, pred, images, ids, patch, norm_pix, mean, std):
    """The loss written out in plain torch, everything in ``dtype``."""
    B, _, _, W = images.shape
    columns = W // patch
    images = images.to(dtype)
    if mean is not None:
        images = (images / 255 - mean.to(dtype)[:, None, None]) / std.to(dtype)[:, None, None]
    target = torch.stack([
        torch.stack([images[b, :, int(i) // columns * patch : int(i) // columns * patch + patch,
                            int(i) % columns * patch : int(i) % columns * patch + patch].permute(1, 2, 0).reshape(-1)
                     for i in ids[b]])
        for b in range(B)])  # fmt: skip
    if norm_pix:
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    return (pred.to(dtype) - target).square().mean(-1).mean()


def gradient(loss, pred):
    return torch.autograd.grad(loss, pred)[0]


@pytest.mark.parametrize("norm_pix", [False, True])
@pytest.mark.parametrize("pred_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("image_dtype", [torch.uint8, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_loss_and_gradient_are_as_exact_as_torchs(shape, image_dtype, pred_dtype, norm_pix, device):
    B, C, _, _, patch, Q = shape
    losses, gradients = [], []
    for _ in range(4):  # one scalar may be right by luck; torch's own error is the largest of several draws
        images, ids, mean, std = inputs(*shape, image_dtype, device)
        pred = torch.randn(B, Q, C * patch**2, device=device).to(pred_dtype).requires_grad_()
        pred64 = pred.detach().double().requires_grad_()
        rest = (images, ids, patch, norm_pix, mean, std)
        found = masked_mse(pred, *rest)
        torch_says, exact = loss_in(torch.float32, pred, *rest), loss_in(torch.float64, pred64, *rest)
        losses.append((found.detach(), torch_says.detach(), exact.detach()))
        gradients.append((gradient(found, pred), gradient(torch_says, pred), gradient(exact, pred64)))
    assert_as_exact_as_torch(*map(torch.stack, zip(*losses, strict=True)))
    assert_as_exact_as_torch(*map(torch.stack, zip(*gradients, strict=True)))


def test_a_flat_patch_has_the_target_zero(device):
    images = torch.full((1, 3, 8, 8), 77, dtype=torch.uint8, device=device)
    pred = torch.full((1, 1, 192), 2.0, device=device)
    statistics = torch.full((3,), 0.5, device=device), torch.full((3,), 0.25, device=device)
    loss = masked_mse(pred, images, torch.zeros(1, 1, dtype=torch.int32, device=device), 8, True, *statistics)
    assert abs(loss.item() - 4.0) < 1e-3  # the mean of 192 equal floats is off by an ulp, over the eps of 1e-3


def test_statistics_run_over_all_channels_jointly(device):
    """Per-channel normalisation, a known mistake, would make both channels' targets zero here."""
    images = torch.zeros(1, 2, 2, 2, device=device)
    images[:, 1] = 1.0
    loss = masked_mse(torch.zeros(1, 1, 8, device=device), images, torch.zeros(1, 1, dtype=torch.int32, device=device), 2, True)
    assert abs(loss.item() - 7 / 8) < 1e-4  # unbiased variance of four 0 and four 1 is 2/7


def test_float64_gradient_passes_gradcheck():
    images, ids, _, _ = inputs(2, 3, 6, 10, 2, 4, torch.float32, "cpu")
    pred = torch.randn(2, 4, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda p: masked_mse(p, images.double(), ids, 2, True), (pred,))


def test_two_runs_give_equal_bits(device):
    images, ids, mean, std = inputs(2, 3, 28, 42, 14, 3, torch.uint8, device)
    pred = torch.randn(2, 3, 588, device=device, requires_grad=True)
    first, second = (masked_mse(pred, images, ids, 14, True, mean, std) for _ in range(2))
    assert torch.equal(first, second) and torch.equal(gradient(first, pred), gradient(second, pred))


def test_channels_last_images_give_the_same_loss_and_gradient(device):
    images, ids, mean, std = inputs(2, 3, 32, 48, 16, 4, torch.uint8, device)
    pred = torch.randn(2, 4, 768, device=device, requires_grad=True)
    found, other = (masked_mse(pred, images.to(memory_format=f), ids, 16, True, mean, std)
                    for f in (torch.channels_last, torch.contiguous_format))  # fmt: skip
    assert torch.equal(found, other) and torch.equal(gradient(found, pred), gradient(other, pred))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_gradient_is_made_in_the_predictions_dtype(dtype, device):
    """Of the op itself: autograd would silently convert another dtype, after it has taken its memory."""
    images, ids, mean, std = inputs(2, 3, 8, 12, 4, 2, torch.uint8, device)
    rows = [torch.rand(2, 2, device=device) for _ in range(3)]
    pred = torch.randn(2, 2, 48, device=device).to(dtype)
    assert torch.ops.fastmae.masked_mse_bwd(rows[0], pred, images, ids, rows[1], rows[2], 4, mean, std).dtype == dtype


@pytest.mark.twin
def test_ops_pass_opcheck(device):
    images, ids, mean, std = inputs(2, 3, 8, 12, 4, 2, torch.uint8, device)
    pred = torch.randn(2, 2, 48, device=device, requires_grad=True)
    torch.library.opcheck(torch.ops.fastmae.masked_mse.default, (pred, images, ids, 4, True, mean, std))
    rows = [torch.rand(2, 2, device=device) for _ in range(3)]
    torch.library.opcheck(
        torch.ops.fastmae.masked_mse_bwd.default, (rows[0], pred.detach(), images, ids, rows[1], rows[2], 4, mean, std)
    )


def test_wrong_arguments_are_named():
    images, ids = torch.zeros(2, 3, 8, 12), torch.zeros(2, 2, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"pred must be floating point \(2, 2, 48\)"):
        masked_mse(torch.zeros(2, 2, 47), images, ids, 4, True)
    with pytest.raises(ValueError, match="no gradient for images"):
        masked_mse(torch.zeros(2, 2, 48), images.requires_grad_(), ids, 4, True)
    with pytest.raises(ValueError, match="at least 2 values"):
        masked_mse(torch.zeros(2, 2, 1), torch.zeros(2, 1, 8, 12), ids, 1, True)
