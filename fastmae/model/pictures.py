"""Pictures that a person can judge a run by: strips of reconstructions, and the loss over time."""

import json
import math
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fastmae.kernels.masked_mse import EPS
from fastmae.model.mae import MAE
from fastmae.optional import require

COLUMNS = ("original", "masked", "reconstruction", "reconstruction + visible")
CAPTION = "Visible patches look noisy in the reconstruction: no loss is put on visible patches."
_GREY = 0.5
_GAP = 4  # pixels


@torch.no_grad()
def reconstruct(model: MAE, images: Tensor, mask_ratio: float, noise: Tensor | None = None) -> Tensor:
    """The four pictures of ``COLUMNS`` for each image: (B, 4, C, H, W) float32 in [0, 1], on the CPU.

    ``images`` (B, C, H, W) uint8. A model of normalised pixels predicts contrast only; each patch gets its true mean and
    deviation back, as in the paper's figures.
    """
    was_training = model.training
    model.eval()
    _, pred, mask = model(images, mask_ratio, noise)
    model.train(was_training)
    normalized = model.normalize(images)
    target = model.patchify(normalized)
    if model.config.norm_pix_loss:
        variance, mean = torch.var_mean(target, dim=-1, keepdim=True)
        pred = pred * (variance + EPS) ** 0.5 + mean
    is_masked = mask[..., None].bool()
    patches = [target, pred, torch.where(is_masked, pred, target)]
    std, mean = model.pixel_std[:, None, None], model.pixel_mean[:, None, None]
    original, reconstruction, pasted = ((model.unpatchify(p.float()) * std + mean).clamp(0, 1) for p in patches)
    hole = model.unpatchify(is_masked.expand_as(target).float())
    return torch.stack([original, original.lerp(torch.full_like(original, _GREY), hole), reconstruction, pasted], 1).cpu()


def strip(pictures: Tensor) -> Image.Image:
    """One picture of ``reconstruct``'s result (B, 4, C, H, W): a row for each image, under ``CAPTION`` and the columns' names.

    Every pixel becomes a square of at least 2 x 2. Images of other than 3 channels show their first one.
    """
    B, N, C, H, W = pictures.shape
    scale = 2 * max(1, 128 // H)  # small images are enlarged further, so that a patch can be seen
    H, W = H * scale, W * scale
    font = ImageFont.load_default(size=max(12, min(H, W) // 14))  # grows with the tiles: readable in a picture scaled down
    line = sum(font.getmetrics()) + _GAP  # pixels
    pitch = _GAP + max(W, *(math.ceil(font.getlength(name)) for name in COLUMNS))
    canvas = Image.new("RGB", (N * pitch + _GAP, 2 * line + B * (H + _GAP)), "white")
    draw = ImageDraw.Draw(canvas)
    draw.text((_GAP, _GAP // 2), CAPTION, fill="dimgray", font=font)
    pixels = (pictures * 255).round().to(torch.uint8)
    pixels = pixels if C == 3 else pixels[:, :, :1].expand(-1, -1, 3, -1, -1)
    for column, name in enumerate(COLUMNS):
        x = _GAP + column * pitch
        draw.text((x, line + _GAP // 2), name, fill="black", font=font)
        for row in range(B):
            tile = Image.fromarray(pixels[row, column].permute(1, 2, 0).contiguous().numpy())
            canvas.paste(tile.resize((W, H), Image.Resampling.NEAREST), (x, 2 * line + row * (H + _GAP)))
    return canvas


def plot_loss(metrics: str | Path, out: str | Path) -> None:
    """Draw loss and learning rate of a ``metrics.jsonl`` over steps into a PNG. Of a step logged twice the last counts."""
    figures = require("matplotlib.figure", "the loss plot")  # slow to import
    records = (json.loads(line) for line in Path(metrics).read_text().splitlines())
    by_step = {r["step"]: r for r in records if r.get("loss") is not None}
    steps = sorted(by_step)
    figure = figures.Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, [by_step[s]["loss"] for s in steps], color="tab:blue")
    axes.set(xlabel="step", ylabel="loss (mean squared error of masked patches)", title="pretraining loss")
    axes.grid(alpha=0.3)
    rate = axes.twinx()
    rate.plot(steps, [by_step[s]["lr"] for s in steps], color="tab:orange", linewidth=1, linestyle="--")
    rate.set_ylabel("learning rate (dashed)")
    rate.set_ylim(bottom=0)
    figure.savefig(out, dpi=120)
