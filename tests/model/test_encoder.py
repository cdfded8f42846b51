"""Images of other sizes than the config's: what their patches' positions are, and what becomes of them."""

import pytest
import torch

from fastmae import random_masking
from fastmae.model.positions import sincos_positions
from tests.support.models import make


def test_any_size_is_encoded_with_the_same_relative_positions():
    large, small = make(3, 32, 8), make(3, (16, 24), 8)
    with torch.inference_mode():
        features = large.encode(torch.ones(2, 3, 16, 24, dtype=torch.float64))
    small.load_state_dict({n: t for n, t in large.state_dict().items() if "pos_embed" not in n}, strict=False)
    with torch.no_grad():
        for name in ("pos_embed", "decoder_pos_embed"):
            own = getattr(small, name)
            own.copy_(sincos_positions(own.shape[-1], (2, 3), (4, 4)))
    images = torch.randn(2, 3, 16, 24, dtype=torch.float64)
    assert torch.equal(large.encode(images), small.encode(images)) and features.shape == (2, 7, large.config.embed_dim)
    masking = random_masking(2, 6, 0.5, seed=0)
    assert torch.equal(large.training_loss(images, masking), small.training_loss(images, masking))  # also after inference_mode
    assert "pos_embed_16x24" not in large.state_dict()


def test_trained_positions_are_interpolated_and_follow_loaded_weights():
    model = make(3, 32, 8)
    model.encode(torch.zeros(1, 3, 64, 32, dtype=torch.float64))
    state = model.state_dict()
    D = state["pos_embed"].shape[-1]
    rows = torch.arange(4, dtype=torch.float64).view(4, 1, 1).expand(4, 4, D)  # in each row of patches its number
    state["pos_embed"] = torch.cat([torch.full_like(state["pos_embed"][:, :1], 7), rows.reshape(1, 16, -1)], 1)
    model.load_state_dict(state)
    table = model.positions("pos_embed", (64, 32))
    assert (table[:, 0] == 7).all()
    found = table[0, 1:].view(8, 4, D)
    assert (found == found[:, :1, :1]).all() and (found[:, 0, 0].diff() > 0).all()  # twice as many rows, as many columns
    torch.testing.assert_close(found + found.flip(0), torch.full_like(found, 3))  # the same places: as far from both ends


def test_a_new_size_inside_torch_compile_names_add_size():
    model = make(3, 32, 8, depth=1).float()
    encode = torch.compile(model.encode, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=r"call add_size\(\(16, 16\)\) before torch.compile"):
        encode(torch.zeros(1, 3, 16, 16))
    model.add_size((16, 16))
    assert encode(torch.zeros(1, 3, 16, 16)).shape == (1, 5, model.config.embed_dim)
