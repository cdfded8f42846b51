"""Pictures: the right pixels in the right column."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from fastmae import MAE, ModelConfig, random_masking
from fastmae.model.pictures import COLUMNS, plot_loss, reconstruct, strip


def make(norm_pix, in_chans=3):
    config = ModelConfig(img_size=(16, 32), patch_size=8, in_chans=in_chans, embed_dim=24, depth=1, num_heads=2,
                         decoder_embed_dim=8, decoder_depth=1, decoder_num_heads=2, norm_pix_loss=norm_pix)  # fmt: skip
    return MAE(config)


@pytest.mark.parametrize("norm_pix", [False, True])
def test_each_column_shows_what_its_title_says(norm_pix):
    model = make(norm_pix)
    images = torch.randint(0, 256, (2, 3, 16, 32), dtype=torch.uint8)
    noise = torch.rand(2, 8)
    original, masked, reconstruction, pasted = reconstruct(model, images, 0.75, noise).unbind(1)
    torch.testing.assert_close(original, images / 255, atol=1e-6, rtol=0)
    masking = random_masking(2, 8, 0.75, noise=noise)
    for b in range(2):
        for patch in range(8):
            y, x = patch // 4 * 8, patch % 4 * 8
            here = (b, slice(None), slice(y, y + 8), slice(x, x + 8))
            is_kept = patch in masking.ids_keep[b].tolist()
            assert torch.equal(pasted[here], original[here] if is_kept else reconstruction[here])
            assert torch.equal(masked[here], original[here]) if is_kept else (masked[here] == 0.5).all()


def test_a_perfect_prediction_of_normalised_pixels_is_shown_as_the_original(monkeypatch):
    model = make(True)
    images = torch.randint(0, 256, (1, 3, 16, 32), dtype=torch.uint8)

    def perfect(images, mask_ratio, noise):
        target = model.patchify(model.normalize(images))
        pred = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
        return None, pred, torch.ones(1, 8)

    monkeypatch.setattr(model, "forward", perfect)
    torch.testing.assert_close(reconstruct(model, images, 0.75)[:, 2], images / 255, atol=1e-5, rtol=0)


@pytest.mark.parametrize("in_chans", [1, 3, 4])
def test_strip_has_a_tile_for_every_picture(in_chans):
    picture = strip(torch.rand(3, len(COLUMNS), in_chans, 16, 32))
    assert picture.mode == "RGB" and picture.width > 4 * 32 and picture.height > 3 * 16
    tile = np.asarray(picture)[18 : 18 + 128, 4 : 4 + 256]
    assert tile.std() > 10


def test_a_strips_tiles_have_the_colours_of_their_pictures():
    pictures = torch.rand(2, len(COLUMNS), 3, 16, 32)
    drawn = np.asarray(strip(pictures)).astype(int)
    tiles = [drawn[18 + 132 * row :, 4 + 260 * column :][:128:8, :256:8] for row in (0, 1) for column in range(len(COLUMNS))]
    expected = (pictures * 255).round().flatten(0, 1).permute(0, 2, 3, 1).int().numpy()
    assert np.array_equal(np.stack(tiles), expected)


def test_loss_plot_is_a_picture_of_the_last_values(tmp_path):
    records = [{"step": s, "loss": 1 / s, "lr": 0.1} for s in (1, 2, 3, 2, 4)] + [{"event": "end"}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)))
    plot_loss(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    with Image.open(tmp_path / "loss.png") as image:
        assert image.width > 800 and np.asarray(image.convert("L")).std() > 5
