"""The official work of a step: the published numbers, and what torch counts in the reference's call."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastmae import MAE
from fastmae.model.config import ModelConfig, preset
from fastmae.model.flops import training_flops


@pytest.mark.parametrize(("name", "gigaflops"), [("base", 58.5), ("large", 124.2), ("huge", 291.0)])
def test_published_sizes_have_their_published_work(name, gigaflops):
    assert training_flops(preset(name), 0.75) / 1e9 == pytest.approx(gigaflops, abs=0.05)


def test_torch_counts_the_same_in_the_references_call():
    config = ModelConfig(img_size=(32, 48), patch_size=8, embed_dim=24, depth=2, num_heads=3, decoder_embed_dim=16,
                         decoder_depth=1, decoder_num_heads=2, attention="math")  # fmt: skip
    model = MAE(config).double()  # float64, so that every product is one that the counter knows
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(3, 3, 32, 48, dtype=torch.float64), 0.75)[0].backward()
    assert counter.get_total_flops() == 3 * training_flops(config, 0.75)
