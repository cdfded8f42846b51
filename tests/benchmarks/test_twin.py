"""The benchmarks' plain twin of the reference computes what fastmae and the tests' oracle compute."""

import pytest
import torch

from fastmae import MAE, ModelConfig
from fastmae.benchmarks.training.twin import TwinMAE
from tests.support.oracle import oracle


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("norm_pix", [False, True])
def test_the_twin_equals_fastmae_and_the_oracle(norm_pix, fused):
    config = ModelConfig(img_size=(32, 48), patch_size=8, embed_dim=24, depth=2, num_heads=3, decoder_embed_dim=16,
                         decoder_depth=2, decoder_num_heads=4, norm_pix_loss=norm_pix)  # fmt: skip
    model, twin = MAE(config).double(), TwinMAE(config, fused).double()
    twin.load_state_dict(model.state_dict(), strict=True)
    assert list(twin.state_dict()) == list(model.state_dict())
    images = torch.randn(3, 3, 32, 48, dtype=torch.float64)
    torch.manual_seed(3)
    noise = torch.rand(3, 24)
    torch.manual_seed(3)
    loss, pred, mask = twin(images, 0.75)
    expected, expected_pred, is_removed = oracle(
        dict(model.named_parameters()), images, noise, 0.75, patch=8, heads=3, decoder_heads=4, norm_pix=norm_pix
    )
    ours, _, our_mask = model(images, 0.75, noise)
    assert torch.equal(mask, is_removed.double()) and torch.equal(mask, our_mask)
    torch.testing.assert_close(pred, expected_pred, rtol=1e-10, atol=1e-10)
    assert abs(loss - expected) / expected < 1e-12 and abs(loss - ours) / ours < 1e-12
    loss.backward()
    ours.backward()
    theirs = dict(twin.named_parameters())
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert (theirs[name].grad - p.grad).norm() <= 1e-10 * p.grad.norm()
