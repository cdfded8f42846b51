"""Pictures: the right pixels in the right column."""

import json

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from fastmae import MAE, ModelConfig, random_masking
from fastmae.model.pictures import CAPTION, COLUMNS, plot_loss, reconstruct, strip


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


@pytest.mark.parametrize(("in_chans", "height", "width", "scale"), [(1, 16, 32, 16), (3, 100, 30, 2), (4, 130, 200, 2)])
def test_every_pixel_of_a_strip_is_a_square_of_its_pictures_colour(in_chans, height, width, scale):
    pictures = torch.rand(2, len(COLUMNS), in_chans, height, width)
    drawn = np.asarray(strip(pictures))
    header, pitch = drawn.shape[0] - 2 * (height * scale + 4), (drawn.shape[1] - 4) // len(COLUMNS)
    colours = pictures if in_chans == 3 else pictures[:, :, [0, 0, 0]]
    expected = (colours * 255).round().permute(0, 1, 3, 4, 2).byte().numpy().repeat(scale, 2).repeat(scale, 3)
    for row in range(2):
        for column in range(len(COLUMNS)):
            y, x = header + row * (height * scale + 4), 4 + column * pitch
            assert np.array_equal(drawn[y : y + height * scale, x : x + width * scale], expected[row, column])


@pytest.mark.parametrize(("height", "width"), [(16, 32), (224, 32), (32, 500), (224, 224)])
def test_a_strip_carries_its_caption_and_the_columns_names_and_both_fit(height, width, monkeypatch):
    written, genuine = {}, ImageDraw.ImageDraw.text

    def write(draw, xy, text, fill, font):
        written[text] = draw.textbbox(xy, text, font)
        genuine(draw, xy, text, fill, font)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", write)
    picture = strip(torch.ones(1, len(COLUMNS), 3, height, width))
    caption, *names = (written[text] for text in (CAPTION, *COLUMNS))
    assert "no loss is put on visible patches" in CAPTION
    right = [*(name[0] for name in names[1:]), picture.width]
    assert caption[2] <= picture.width and all(name[2] <= end for name, end in zip(names, right, strict=True))
    assert all(caption[3] <= name[1] for name in names)
    for box in written.values():
        assert np.asarray(picture.crop(box)).min() < 128  # ink


def test_loss_plot_is_a_picture_of_the_last_values(tmp_path):
    records = [{"step": s, "loss": 1 / s, "lr": 0.1} for s in (1, 2, 3, 2, 4)] + [{"event": "end"}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)))
    plot_loss(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    with Image.open(tmp_path / "loss.png") as image:
        assert image.width > 800 and np.asarray(image.convert("L")).std() > 5
