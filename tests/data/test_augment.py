"""Crops: the stated distribution, Pillow's filter, and nothing but the numbers given."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from fastmae import InputError
from fastmae.data.augment import DRAWS, Augment, center_box, crop_box
from fastmae.images.resize import resized_crop
from fastmae.kernels.philox import CROPS, uniform
from tests.support.pictures import make_picture


def boxes(count, height, width, augment=Augment()):  # noqa: B008 - frozen
    draws = uniform(0, CROPS, 0, torch.arange(count), DRAWS).numpy()
    return np.array([crop_box(row, height, width, augment) for row in draws])


@pytest.mark.parametrize("size", [(224, 224), (375, 500), (30, 400), (400, 30), (1, 1), (1, 3000)])
def test_boxes_lie_inside_the_image(size):
    top, left, h, w = boxes(500, *size).T
    assert (top >= 0).all() and (left >= 0).all() and (h >= 1).all() and (w >= 1).all()
    assert (top + h <= size[0]).all() and (left + w <= size[1]).all()


def test_area_and_aspect_follow_the_stated_distribution():
    """On a large square image nearly every first try fits, so shares are nearly uniform and ratios log-uniform."""
    _, _, h, w = boxes(4000, 1000, 1000, Augment(scale=(0.2, 0.5))).T
    share, ratio = h * w / 1e6, np.log(w / h)
    assert share.min() > 0.199 and share.max() < 0.501 and abs(share.mean() - 0.35) < 0.006
    assert abs(ratio).max() < np.log(4 / 3) + 0.005 and abs(ratio.mean()) < 0.01
    assert abs(ratio.std() - 2 * np.log(4 / 3) / 12**0.5) < 0.006


def test_corners_are_uniform_over_the_places_that_fit():
    top, left, h, w = boxes(4000, 300, 400, Augment(scale=(0.25, 0.25))).T
    for start, room in ((top, 300 - h + 1), (left, 400 - w + 1)):
        assert abs(((start + 0.5) / room).mean() - 0.5) < 0.02
        assert start.min() == 0 and (start == room - 1).any()


def test_an_extreme_image_gets_the_largest_centred_box_of_an_allowed_ratio():
    assert (boxes(50, 30, 3000) == [0, 1480, 30, 40]).all()
    assert (boxes(50, 3000, 30) == [1480, 0, 40, 30]).all()


@pytest.mark.parametrize("sides", [(90, 120), (256, 340), (60, 400), (1, 1), (1, 3000), (3000, 1)])
@pytest.mark.parametrize("size", [(32, 32), (24, 40), (224, 224)])
def test_resizing_is_pillows_antialiased_bicubic(size, sides):
    """Random boxes, shrunk and enlarged: mean error at most 0.1 of 255 levels."""
    image = np.array(make_picture(2, sides))
    differences = []
    for top, left, h, w in boxes(12, *sides):
        found = resized_crop(image, (top, left, h, w), size).permute(1, 2, 0).numpy().astype(np.int64)
        crop = Image.fromarray(image).crop((left, top, left + w, top + h)).resize(size[::-1], Image.Resampling.BICUBIC)
        differences.append(abs(found - np.asarray(crop, np.int64)))
    assert np.mean(differences) <= 0.1 and np.max(differences) <= 2


def test_flip_mirrors_left_to_right():
    image = np.array(make_picture(2))
    straight, mirrored = (resized_crop(image, (0, 0, 48, 64), (16, 16), flip) for flip in (False, True))
    assert torch.equal(straight.flip(2), mirrored)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_filter_is_that_of_interpolate_wherever_it_is_written(flip, channels):
    image = np.array(make_picture(2, (90, 120)))[..., :channels]
    crop = torch.from_numpy(image[7:68, 11:94]).permute(2, 0, 1)[None]
    expected = F.interpolate(crop, (24, 40), mode="bicubic", antialias=True)[0]
    expected = expected.flip(2) if flip else expected
    for out in (
        None,
        torch.zeros(channels, 24, 40, dtype=torch.uint8),
        torch.zeros(24, 40, channels, dtype=torch.uint8).permute(2, 0, 1),
    ):
        assert torch.equal(resized_crop(image, (7, 11, 61, 83), (24, 40), flip, out), expected)
        assert out is None or torch.equal(out, expected)


def test_center_box_has_the_aspect_of_the_target():
    assert center_box(100, 200, (50, 50)) == (0, 50, 100, 100)
    assert center_box(200, 100, (50, 100)) == (75, 0, 50, 100)
    assert center_box(1, 1, (224, 224)) == (0, 0, 1, 1)


@pytest.mark.parametrize("fields", [{"scale": (0.5, 0.2)}, {"scale": (0.0, 1.0)}, {"scale": (0.2, 1.1)}, {"ratio": (2.0, 1.0)}])
def test_limits_that_cannot_work_are_named(fields):
    with pytest.raises(InputError, match=f"crop {next(iter(fields))} must be"):
        Augment(**fields)


@pytest.mark.parametrize(("side", "share", "width"), [(375, 1 / 8, 194), (256, 2 / 3, 132)])
def test_smaller_shards_mean_more_crops_that_are_enlarged(side, share, width):
    """The guidance of docs/data.md, for a photograph of 500 x 375."""
    height, breadth = side, round(500 * side / 375)
    _, _, h, w = boxes(4000, height, breadth).T
    assert abs((np.sqrt(h * w) < 224).mean() - share) < 0.02
    assert round((0.2 * height * breadth) ** 0.5) == width
