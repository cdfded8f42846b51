"""Model configs: presets, round trips, and messages that name what is wrong."""

import pytest

from fastmae import InputError, ModelConfig
from fastmae.model.config import PRESETS, preset


@pytest.mark.parametrize("name", PRESETS)
def test_json_reads_back_equal(name):
    config = preset(name, img_size=(112, 224), norm_pix_loss=True)
    assert ModelConfig.from_json(config.to_json()) == config


def test_one_number_is_a_square():
    assert ModelConfig(img_size=32).grid == (2, 2)
    assert ModelConfig(img_size=(32, 48)).patches == 6


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"img_size": 225}, r"image size \(225, 225\) .* multiple of the patch size 16; the nearest are \[224, 240\]"),
        ({"img_size": (32, 0)}, "image size"),
        ({"embed_dim": 100}, r"embed_dim must be a multiple of num_heads \(12\)"),
        ({"decoder_embed_dim": 30, "decoder_num_heads": 3}, "decoder_embed_dim must be a multiple"),
        ({"decoder_depth": 0}, "decoder_depth must be a positive integer, got 0"),
        ({"pixel_mean": (0.5,)}, "pixel_mean must have 3 values"),
        ({"pixel_std": (0.1, 0.0, 0.1)}, "pixel_std must be positive"),
        ({"attention": "flsh"}, "attention must be one of auto, short, xformers, .* got 'flsh'"),
        ({"patch_size": 1, "in_chans": 1, "norm_pix_loss": True}, "at least 2 values"),
    ],
)
def test_values_that_cannot_work_are_named(fields, message):
    with pytest.raises(InputError, match=message):
        ModelConfig(**fields)


def test_an_unknown_preset_lists_the_known():
    with pytest.raises(InputError, match="tiny, small, base, large, huge, got 'giant'"):
        preset("giant")


def test_fields_of_a_newer_version_are_refused():
    with pytest.raises(InputError, match=r"unknown fields \['drop_path'\]"):
        ModelConfig.from_json('{"drop_path": 0.1}')
