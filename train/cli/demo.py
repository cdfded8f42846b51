"""``fastmae demo``, from images to reconstructions on ten real photographs: shards, pretraining, pictures and the report."""

import shutil
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from fastmae.data.augment import Augment
from fastmae.errors import InputError
from fastmae.files import make_folder
from fastmae.images.photographs import find_photographs
from fastmae.images.recode import Recode
from fastmae.model.config import ModelConfig
from fastmae.model.pictures import plot_loss
from fastmae.model.weights import load_model
from fastmae.shards.build import write_shards
from fastmae.train.checkpoint.format import MODEL, step_of
from fastmae.train.cli.reconstruct import draw_strip
from fastmae.train.config.recipes import Recipe
from fastmae.train.config.run import Run
from fastmae.train.pretrain.pretrain import pretrain
from fastmae.train.pretrain.previews import load_images
from fastmae.train.report.report import write_report

_MARK = ".fastmae-demo"  # file in a folder that a demo may clear
_FOLDERS = ("photographs", "shards", "tensorboard", "reconstructions")


def demo_recipe(steps: int) -> Recipe:
    """A small model of 96-pixel images on ten photographs, plain pixels so that the picture shows what it predicts.

    ``make demo``; two CPU cores, under three minutes. It overfits these photographs, which is all that time allows: the picture
    shows photographs that it was trained on, under masks that it has not seen.
    """
    model = ModelConfig(img_size=96, patch_size=12, embed_dim=192, depth=4, num_heads=4,
                        decoder_embed_dim=128, decoder_depth=3, decoder_num_heads=4, norm_pix_loss=False)  # fmt: skip
    return Recipe(model=model, steps=steps, epochs=100, warmup_epochs=5, effective_batch=16, blr=2.4e-2,
                  augment=Augment(scale=(0.7, 1.0), ratio=(0.95, 1.05), flip=False))  # fmt: skip


def demo(out: Path, *, steps: int = 1400, workers: int = 1) -> None:
    """Write shards, checkpoints, logs, ``loss.png``, ``reconstruction.png`` and ``report.html`` under ``out``.

    Replaces an earlier demo. Raises InputError if the photographs' packages are missing or ``out`` cannot be written,
    KeyboardInterrupt if a signal has ended the training.
    """
    photographs = find_photographs()
    recipe = demo_recipe(steps)
    make_folder(out)
    if any(out.iterdir()) and not (out / _MARK).exists():
        raise InputError(f"{out}: is not empty and not the folder of a demo; give an empty folder as --out")
    (out / _MARK).touch()
    for old in (*_FOLDERS, "step-*", "metrics.jsonl", "settings.json", "loss.png", "report.html"):
        for path in out.glob(old):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    folder = make_folder(out / "photographs")
    for photograph in photographs:
        shutil.copy(photograph, folder)
    with tqdm(total=len(photographs), unit="image", desc="shards") as bar:
        write_shards(folder, out / "shards", Recode(resize=256), progress=lambda done, _: bar.update(done - bar.n))
    run = Run(data=str(out / "shards"), out=out, batch_size=recipe.effective_batch, workers=workers, log_every=25,
              save_every=400, draw_every=350)  # fmt: skip
    checkpoint = pretrain(recipe, run)
    if step_of(checkpoint) < steps:
        raise KeyboardInterrupt("the demo was stopped; the next one starts from step 0")
    plot_loss(out / "metrics.jsonl", out / "loss.png")
    write_report(out)
    model = load_model(checkpoint / MODEL).to("cuda" if torch.cuda.is_available() else "cpu")
    images = load_images(folder, model, len(photographs))
    draw_strip(model, images, out / "reconstruction.png", mask_ratio=recipe.mask_ratio, seed=1)
    print(f"look at {out / 'reconstruction.png'}, {out / 'loss.png'}, {out / 'report.html'}", file=sys.stderr)
