"""resized_crop: every byte against the formula in float64 and against torch's filter."""

import mmap

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastmae.kernels import resized_crop
from tests.support.twins import twin

pytestmark = pytest.mark.worth(2)

POISON = 255  # the bytes around every image
HALF = 0.51  # levels between a rounded value and the exact one: a half, and float32's own error


def batch(images, boxes, flips, device):
    """The first five arguments: images (H, W, C) uint8 in one buffer, each box with the number of its image before it."""
    C = images[0].shape[2]
    parts, starts, n = [], [], 0
    for image in images:
        around = torch.full((7 + n % 5,), POISON, dtype=torch.uint8)
        starts.append(n + len(around))
        parts += [around, image.flatten()]
        n += len(around) + image.numel()
    number = [b[0] for b in boxes]
    offsets = torch.tensor([starts[i] for i in number], dtype=torch.int64)
    widths = torch.tensor([images[i].shape[1] for i in number], dtype=torch.int32)
    sides = torch.tensor([b[1:] for b in boxes], dtype=torch.int32)
    pixels = torch.cat([*parts, torch.full((3 * C,), POISON, dtype=torch.uint8)])
    return tuple(t.to(device) for t in (pixels, offsets, widths, sides, torch.tensor(flips)))


def noise(*shape):
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def random_boxes(images, count):
    boxes = []
    for i in range(count):
        H, W, _ = images[i % len(images)].shape
        height, width = int(torch.randint(1, H + 1, ())), int(torch.randint(1, W + 1, ()))
        top, left = int(torch.randint(0, H - height + 1, ())), int(torch.randint(0, W - width + 1, ()))
        boxes.append((i % len(images), top, left, height, width))
    return boxes


def crop_box(images, box):
    number, top, left, height, width = box
    return images[number][top : top + height, left : left + width]


def by_torch(images, boxes, flips, size):
    crops = []
    for box, flip in zip(boxes, flips, strict=True):
        crop = F.interpolate(crop_box(images, box).permute(2, 0, 1)[None].float(), size, mode="bicubic", antialias=True)[0]
        crops.append(crop.round().clamp(0, 255).to(torch.uint8).flip(2 if flip else ()))
    return torch.stack(crops)


def weights(length, size):
    """The matrix (size, length) of one axis, in float64, from the formula alone."""
    scale = length / size
    s = max(scale, 1.0)
    centre = scale * (np.arange(size) + 0.5)
    t = np.abs((np.arange(length)[None, :] - centre[:, None] + 0.5) / s)
    k = np.where(t < 1, 1.5 * t**3 - 2.5 * t**2 + 1, np.where(t < 2, -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2, 0))
    return k / k.sum(1, keepdims=True)


def by_formula(images, boxes, flips, size):
    """Not rounded, (B, C, h, w) float64."""
    crops = []
    for box, flip in zip(boxes, flips, strict=True):
        image = crop_box(images, box).numpy().astype(np.float64)
        crop = np.einsum(
            "yi,xj,ijc->cyx", weights(image.shape[0], size[0]), weights(image.shape[1], size[1]), image, optimize=True
        )
        crops.append(crop[:, :, ::-1] if flip else crop)
    return torch.from_numpy(np.stack(crops).clip(0, 255))


def assert_is_the_filter(images, boxes, flips, size, device):
    found = resized_crop(*batch(images, boxes, flips, device), size, images[0].shape[2])
    assert found.dtype == torch.uint8 and found.is_contiguous()
    found = found.cpu().double()
    assert (found - by_formula(images, boxes, flips, size)).abs().max() <= HALF
    levels = (found - by_torch(images, boxes, flips, size).double()).abs()
    assert levels.max() <= 1 and levels.mean() <= 0.1  # ties may fall either way


# Crops of one tile and of several, divisible and not; together 200 boxes, longer and shorter than their crops.
@pytest.mark.parametrize(
    ("C", "size", "count"),
    [(3, (9, 13), 25), (1, (16, 16), 8), twin(1, (16, 16), 148), (1, (20, 37), 10), (1, (1, 5), 6), (13, (7, 8), 2)],
)
def test_random_boxes_are_filtered_by_the_formula(C, size, count, device):
    images = [noise(24, 31, C), noise(40, 17, C), noise(11, 52, C)]
    flips = [i % 3 == 0 for i in range(count)]
    assert_is_the_filter(images, random_boxes(images, count), flips, size, device)


@pytest.mark.parametrize("shape", [(1, 1), (1, 3000), twin((3000, 1)), (2, 2), (150, 3)], ids=str)
def test_images_of_any_shape_are_filtered_by_the_formula(shape, device):
    assert_is_the_filter([noise(*shape, 1)], [(0, 0, 0, *shape)], [True], (6, 10), device)


def test_edges_of_black_and_white_do_not_wrap_around(device):
    checkers = (torch.arange(12)[:, None] // 3 + torch.arange(15) // 3) % 2 * 255
    image = checkers.to(torch.uint8)[..., None]
    assert_is_the_filter([image], [(0, 0, 0, 12, 15), (0, 1, 2, 5, 4)], [False, False], (17, 21), device)


def test_a_box_of_the_crops_size_is_copied(device):
    images = [noise(19, 33, 3)]
    found = resized_crop(*batch(images, [(0, 2, 5, 17, 21)], [False], device), (17, 21))
    assert torch.equal(found[0].cpu(), crop_box(images, (0, 2, 5, 17, 21)).permute(2, 0, 1))


def test_a_flip_mirrors_the_crop_from_left_to_right(device):
    images = [noise(24, 31, 3)]
    boxes = random_boxes(images, 6)
    straight = resized_crop(*batch(images, boxes, [False] * 6, device), (9, 35))
    assert torch.equal(resized_crop(*batch(images, boxes, [True] * 6, device), (9, 35)), straight.flip(3))


def test_bytes_outside_the_box_are_never_used(device):
    image = torch.full((20, 23, 3), POISON, dtype=torch.uint8)
    boxes = [(0, 4, 5, 7, 6), (1, 0, 0, 1, 1), (0, 4, 5, 7, 6)]
    crop_box([image], boxes[0]).zero_()
    found = resized_crop(*batch([image, torch.zeros(1, 1, 3, dtype=torch.uint8)], boxes, [False, True, True], device), (10, 5))
    assert not found.any()


def test_a_crop_is_the_same_alone_and_in_any_batch(device):
    images = [noise(24, 31, 3), noise(40, 17, 3)]
    pixels, *rest = batch(images, random_boxes(images, 5), [i % 2 == 0 for i in range(5)], device)
    found = resized_crop(pixels, *rest, (9, 13))
    assert torch.equal(resized_crop(pixels, *rest, (9, 13)), found)
    order = torch.randperm(5).to(device)
    assert torch.equal(resized_crop(pixels, *(t[order] for t in rest), (9, 13)), found[order])
    assert torch.equal(resized_crop(pixels, *(t[3:4] for t in rest), (9, 13)), found[3:4])


def test_strided_arguments_give_the_same_crops(device):
    images = [noise(24, 31, 3)]
    arguments = batch(images, random_boxes(images, 3), [True, False, True], device)
    strided = [torch.stack([t, t.flip(0)], -1)[..., 0] for t in arguments]
    assert not any(t.is_contiguous() for t in strided)
    assert torch.equal(resized_crop(*strided, (9, 13)), resized_crop(*arguments, (9, 13)))


def test_an_image_past_two_to_the_31_bytes_is_found(device):
    far = 2**31 + 5
    if device == "cpu":  # pages that nobody touches cost no memory, and are given back
        pixels = torch.frombuffer(mmap.mmap(-1, far + 4 * 6 * 3), dtype=torch.uint8)
    else:
        pixels = torch.empty(far + 4 * 6 * 3, dtype=torch.uint8, device=device)
    image = noise(4, 6, 3)
    pixels[far:] = image.flatten().to(device)
    rest = batch([image], [(0, 0, 1, 4, 5)], [False], device)[1:]
    found = resized_crop(pixels, torch.full_like(rest[0], far), *rest[1:], (4, 5))
    assert torch.equal(found[0].cpu(), image[:, 1:].permute(2, 0, 1))


def test_no_images_give_no_crops(device):
    pixels, *rest = batch([noise(4, 6, 3)], [(0, 0, 0, 4, 6)], [False], device)
    none = [t[:0] for t in rest]
    assert resized_crop(pixels, *none, (8, 12)).shape == (0, 3, 8, 12)


@pytest.mark.twin
def test_op_passes_opcheck(device):
    images = [noise(9, 7, 3)]
    arguments = batch(images, random_boxes(images, 2), [True, False], device)
    torch.library.opcheck(torch.ops.fastmae.resized_crop.default, (*arguments, 8, 12, 3))


@pytest.mark.twin
def test_it_compiles_into_one_graph(device):
    images = [noise(9, 7, 3)]
    compiled = torch.compile(
        resized_crop, fullgraph=True, dynamic=True, backend="inductor" if device == "cuda" else "aot_eager"
    )
    for B in (2, 3):
        arguments = batch(images, random_boxes(images, B), [True] * B, device)
        assert torch.equal(compiled(*arguments, (8, 12)), resized_crop(*arguments, (8, 12)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pixels": torch.zeros(72)}, r"pixels must be uint8 \(N,\), got torch.float32"),
        ({"offsets": torch.zeros(2, dtype=torch.int32)}, r"offsets must be torch.int64 \(2,\), got torch.int32"),
        ({"widths": torch.zeros(3, dtype=torch.int32)}, r"widths must be torch.int32 \(2,\), got torch.int32 \(3,\)"),
        ({"boxes": torch.zeros(2, 3, dtype=torch.int32)}, r"boxes must be int32 \(B, 4\)"),
        ({"flips": torch.zeros(2, dtype=torch.uint8)}, r"flips must be torch.bool \(2,\)"),
        ({"flips": torch.zeros(2, dtype=torch.bool, device="meta")}, "flips must be on the pixels' device cpu, got meta"),
        ({"size": (8, 0)}, r"size must be two numbers \(h, w\) of at least 1"),
        ({"channels": 0}, "channels at least 1"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    pixels, offsets, widths, boxes, flips = batch([noise(4, 6, 3)], [(0, 0, 0, 4, 6)] * 2, [False] * 2, "cpu")
    good = {"pixels": pixels, "offsets": offsets, "widths": widths, "boxes": boxes, "flips": flips, "size": (8, 12)}
    with pytest.raises(ValueError, match=message):
        resized_crop(**{**good, **change})


@pytest.mark.parametrize(
    "box", [(0, 0, 0, 6), (0, 0, 4, 0), (-1, 0, 4, 6), (0, -1, 4, 6), (0, 1, 4, 6), (0, 0, 6, 6), (2**31 - 1, 0, 1, 1)], ids=str
)
def test_a_box_outside_its_image_is_named(box):
    arguments = batch([noise(4, 6, 3)], [(0, 0, 0, 4, 6), (0, *box)], [False, True], "cpu")
    with pytest.raises(ValueError, match=r"boxes must .* in image 1, 6 pixels wide from byte 7 of 88"):
        resized_crop(*arguments, (8, 12))
