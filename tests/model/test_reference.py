"""Against a clean clone of facebookresearch/mae, where ``FASTMAE_REFERENCE`` names one: same weights, same noise."""

import os

import pytest
import torch

import fastmae
from fastmae import random_masking
from fastmae.benchmarks.training.twin import TwinMAE

CLONE = os.environ.get("FASTMAE_REFERENCE")
pytestmark = [
    pytest.mark.skipif(CLONE is None, reason="FASTMAE_REFERENCE names no clone of facebookresearch/mae"),
    pytest.mark.filterwarnings("ignore"),  # the clone's and timm's, not ours
]


@pytest.mark.parametrize("norm_pix_loss", [True, False])
@pytest.mark.parametrize("name", ["mae_vit_base_patch16", "mae_vit_large_patch16", "mae_vit_huge_patch14"])
def test_loss_prediction_and_every_gradient_are_the_references(name, norm_pix_loss):
    from fastmae.benchmarks.training.reference import load_reference

    ours = getattr(fastmae, name)(norm_pix_loss=norm_pix_loss)
    theirs = getattr(load_reference(CLONE), name)(norm_pix_loss=norm_pix_loss)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert torch.equal(ours.pos_embed, theirs.pos_embed) and torch.equal(ours.decoder_pos_embed, theirs.decoder_pos_embed)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    images, L = torch.randn(2, 3, 224, 224), ours.config.patches

    torch.manual_seed(5)  # the reference draws its noise inside the call
    expected, expected_pred, expected_mask = theirs(images, mask_ratio=0.75)
    torch.manual_seed(5)
    noise = torch.rand(2, L)
    twin = TwinMAE(ours.config)
    twin.load_state_dict(ours.state_dict(), strict=True)
    torch.manual_seed(5)
    assert abs(twin(images)[0] - expected) / expected < 1e-6
    expected.backward()
    gradients = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}

    loss, pred, mask = ours(images, 0.75, noise)
    assert torch.equal(mask, expected_mask)
    assert (pred - expected_pred).abs().max() < 1e-4
    fast = ours.training_loss(images, random_masking(2, L, 0.75, noise=noise))
    for found in (loss, fast):
        assert abs(found - expected) / expected < 1e-5
        ours.zero_grad()
        found.backward()
        own = {n: p.grad for n, p in ours.named_parameters() if p.grad is not None}
        assert own.keys() == gradients.keys()
        worst = max(((own[n] - g).norm() / g.norm()).item() for n, g in gradients.items())
        print(f"{name}: loss {abs(found - expected) / expected:.1e}, gradients {worst:.1e}")
        assert worst < 1e-4
