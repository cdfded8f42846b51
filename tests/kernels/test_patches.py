"""gather_patches: the pixels of chosen patches, in the embedding's order, normalised once."""

import pytest
import torch
import torch.nn.functional as F

from fastmae.kernels import gather_patches
from tests.support.exactness import assert_as_exact_as_torch
from tests.support.patches import SHAPES, inputs

pytestmark = pytest.mark.worth(1)


def by_loops(images, ids, patch):
    columns = images.shape[3] // patch
    rows = []
    for b in range(len(images)):
        corners = [(int(i) // columns * patch, int(i) % columns * patch) for i in ids[b]]
        rows.append(torch.stack([images[b, :, y : y + patch, x : x + patch].reshape(-1) for y, x in corners]))
    return torch.stack(rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_normalised_floats_are_copied_bit_for_bit(shape, dtype, device):
    images, ids, _, _ = inputs(*shape, dtype, device)
    assert torch.equal(gather_patches(images, ids, shape[4]), by_loops(images, ids, shape[4]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_bytes_are_normalised_as_exactly_as_torch_does(shape, dtype, device):
    images, ids, mean, std = inputs(*shape, torch.uint8, device)

    def normalize(x, mean, std):
        return (x / 255 - mean[:, None, None]) / std[:, None, None]

    found = gather_patches(images, ids, shape[4], mean, std, dtype)
    torch_says = by_loops(normalize(images, mean, std), ids, shape[4]).to(dtype)
    exact = by_loops(normalize(images.double(), mean.double(), std.double()), ids, shape[4])
    assert_as_exact_as_torch(found, torch_says, exact)


def test_a_linear_layer_on_the_rows_is_the_strided_convolution(device):
    images = torch.randn(2, 3, 8, 12, dtype=torch.float64, device=device)
    weight = torch.randn(5, 3, 4, 4, dtype=torch.float64, device=device)
    ids = torch.arange(6, dtype=torch.int32, device=device).expand(2, 6)
    tokens = F.linear(gather_patches(images, ids, 4), weight.flatten(1))
    expected = F.conv2d(images, weight, stride=4).flatten(2).transpose(1, 2)
    torch.testing.assert_close(tokens, expected, rtol=1e-12, atol=1e-12)


def test_channels_last_images_give_the_same_rows(device):
    images, ids, mean, std = inputs(2, 3, 32, 48, 16, 4, torch.uint8, device)
    other = images.to(memory_format=torch.channels_last)
    assert torch.equal(gather_patches(images, ids, 16, mean, std), gather_patches(other, ids, 16, mean, std))


def test_masked_patches_are_never_read(device):
    images = torch.zeros(1, 1, 4, 8, device=device)
    images[..., 4:] = float("nan")
    assert torch.equal(
        gather_patches(images, torch.zeros(1, 1, dtype=torch.int32, device=device), 4), torch.zeros(1, 1, 16, device=device)
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_image_gradient_equals_that_of_indexing(shape, device):
    images, ids, _, _ = inputs(*shape, torch.float32, device)
    images.requires_grad_()
    out = gather_patches(images, ids, shape[4])
    weight = torch.randn_like(out)
    (found,) = torch.autograd.grad(out, images, weight)
    (expected,) = torch.autograd.grad(by_loops(images, ids, shape[4]), images, weight)
    assert torch.equal(found, expected)


@pytest.mark.twin
def test_op_passes_opcheck(device):
    images, ids, mean, std = inputs(2, 3, 8, 12, 4, 2, torch.uint8, device)
    torch.library.opcheck(torch.ops.fastmae.gather_patches.default, (images, ids, 4, mean, std, torch.float32))
    floats = torch.randn(2, 3, 8, 12, device=device, requires_grad=True)
    torch.library.opcheck(torch.ops.fastmae.gather_patches.default, (floats, ids, 4, None, None, torch.float32))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(2, 3, 9, 12), torch.zeros(2, 1, dtype=torch.int32), 4), "multiple of the patch size 4"),
        ((torch.zeros(3, 9, 12), torch.zeros(2, 1, dtype=torch.int32), 4), r"images must be \(B, C, H, W\)"),
        ((torch.zeros(2, 3, 8, 12), torch.zeros(2, 1), 4), r"ids must be int32 \(2, K\)"),
        ((torch.zeros(2, 3, 8, 12, dtype=torch.uint8), torch.zeros(2, 1, dtype=torch.int32), 4), "uint8 images need mean"),
        ((torch.zeros(2, 3, 8, 12, dtype=torch.uint8), torch.zeros(2, 1, dtype=torch.int32), 4, torch.zeros(2), torch.ones(2)),
         r"mean and std must be float32 \(3,\)"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        gather_patches(*arguments)
