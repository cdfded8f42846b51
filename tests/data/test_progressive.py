"""Progressive resolution: one model, several image sizes, positions that mean the same places."""

from dataclasses import replace

import pytest
import torch

from fastmae import MAE, InputError, random_masking
from fastmae.model.positions import sincos_positions
from fastmae.train.config.settings import PretrainSettings
from fastmae.train.pretrain.pretrain import pretrain
from tests.support.runs import MODEL, RECIPE, assert_same_bits, losses, run_of, signal_after


def test_a_finer_grid_lies_at_the_same_places():
    """Twice as many patches a side: the mean place of a pair is the place of the patch that they divide."""
    own, fine = (sincos_positions(64, g, (4, 4))[0, 1:] for g in ((4, 4), (8, 8)))
    assert torch.equal(own, sincos_positions(64, (4, 4))[0, 1:])
    # Angles of the slowest frequency are nearly linear in the place: their sines' means are those of the coarse grid.
    slow = fine.view(8, 8, 64)[..., 15].view(4, 2, 4, 2).mean((1, 3))
    assert torch.allclose(slow, own.view(4, 4, 64)[..., 15], atol=1e-6)


def test_other_sizes_train_and_add_no_parameter(device):
    model = MAE(MODEL).to(device)
    names = list(model.state_dict())
    model.add_size((16, 24))
    assert list(model.state_dict()) == names
    images = torch.randint(0, 256, (2, 3, 16, 24), dtype=torch.uint8, device=device)
    masking = random_masking(2, 6, 0.5, seed=0, sample_ids=torch.arange(2, device=device), device=device)
    loss = model.training_loss(images, masking)
    loss.backward()
    assert torch.isfinite(loss) and all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_the_same_image_has_the_same_loss_at_its_own_size_and_at_an_added_one():
    """A model of 32 pixels that was lent the size 16 equals one of 16 pixels with the positions of the coarse places."""
    large = MAE(MODEL)
    large.add_size((16, 16))
    small = MAE(replace(MODEL, img_size=(16, 16)))
    state = {n: t for n, t in large.state_dict().items() if "pos_embed" not in n}
    small.load_state_dict(state, strict=False)
    with torch.no_grad():
        small.pos_embed.copy_(sincos_positions(24, (2, 2), (4, 4)))
        small.decoder_pos_embed.copy_(sincos_positions(16, (2, 2), (4, 4)))
    images = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    masking = random_masking(3, 4, 0.5, seed=0, sample_ids=torch.arange(3))
    assert torch.equal(large.training_loss(images, masking), small.training_loss(images, masking))


def test_a_size_that_the_patch_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="must be a multiple of the patch size 8"):
        MAE(MODEL).add_size((12, 16))


def test_a_progressive_run_is_resumed_bit_for_bit_in_the_middle_of_its_schedule(shard_folder, tmp_path, monkeypatch):
    recipe = replace(RECIPE, progressive=((0.0, (16, 16)), (0.5, (24, 24)), (0.8, (32, 32))))
    whole = pretrain(recipe, run_of(shard_folder, tmp_path / "whole"))
    with monkeypatch.context() as patch:
        signal_after(patch, 2)
        pretrain(recipe, run_of(shard_folder, tmp_path / "halves"))
    assert_same_bits(whole, pretrain(recipe, run_of(shard_folder, tmp_path / "halves", workers=2)))
    assert losses(tmp_path / "whole") == losses(tmp_path / "halves")


def test_views_train_and_resume(shard_folder, tmp_path, monkeypatch):
    recipe = replace(RECIPE, views=2)
    whole = pretrain(recipe, run_of(shard_folder, tmp_path / "whole"))
    with monkeypatch.context() as patch:
        signal_after(patch, 3)
        pretrain(recipe, run_of(shard_folder, tmp_path / "halves"))
    assert_same_bits(whole, pretrain(recipe, run_of(shard_folder, tmp_path / "halves", workers=1)))
    with pytest.raises(InputError, match="made with views 2, not 1"):
        pretrain(RECIPE, run_of(shard_folder, tmp_path / "halves"))


@pytest.mark.parametrize(
    ("stages", "says"),
    [
        (("0:160", "half:192"), "progressive takes SHARE:PIXELS or SHARE:HEIGHTxWIDTH, as in 0.5:192, got 'half:192'"),
        (("0.5:160", "0.2:192"), r"shares of a progressive run must rise inside \[0, 1\), got \[0.5, 0.2\]"),
        (("0:100",), "image size 100 x 100 must be a multiple of the patch size 16"),
        (("0:16",), "mask ratio 0.75 keeps 0 of 1 patches"),
    ],
)
def test_a_schedule_that_cannot_work_is_named(stages, says, tmp_path):
    with pytest.raises(InputError, match=says):
        PretrainSettings(data="x", out=tmp_path, preset="tiny", progressive=stages).resolve(world_size=1)
