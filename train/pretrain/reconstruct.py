"""Show what a checkpoint reconstructs: a strip of original, masked, reconstruction, and that with the visible patches."""

from pathlib import Path

import torch
from torch import Tensor

from fastmae.data.augment import center_box
from fastmae.errors import DataError, InputError, SampleError
from fastmae.files import write_atomically
from fastmae.images.decode import DecodeError, decode
from fastmae.images.listing import list_images
from fastmae.images.recode import Recode, recode
from fastmae.images.resize import resized_crop
from fastmae.kernels.philox import MASKS, uniform
from fastmae.model.config import kept_patches
from fastmae.model.mae import MAE
from fastmae.model.pictures import reconstruct, strip
from fastmae.model.weights import load_model
from fastmae.seeds import check_seed
from fastmae.shards.index import JSON_NAME, Index
from fastmae.shards.read import ShardReader
from fastmae.train.checkpoint.format import MODEL, find_checkpoint, open_checkpoint


def reconstruct_images(checkpoint: Path, images: Path, out: Path, *, mask_ratio: float = 0.75, count: int = 8, seed: int = 0,
                       norm_pix_loss: bool | None = None) -> Path:  # fmt: skip
    """Draw up to ``count`` of ``images`` into the PNG ``out`` and return it.

    ``checkpoint``: a run, one of its checkpoint folders, or a ``.safetensors`` or ``.pth`` file. ``images``: an image, a
    folder of images, or a folder of indexed shards. Images are cut to the model's aspect ratio from their centre. Raises
    InputError or DataError on an encoder-only file, an image that cannot be read, or a path that cannot be written.
    """
    check_seed(seed)
    if count < 1:
        raise InputError(f"count must be at least 1, got {count}")
    model = load_model(weights_file(checkpoint), norm_pix_loss=norm_pix_loss)
    kept_patches(model.config.patches, mask_ratio)
    draw_strip(model, load_images(images, model, count), out, mask_ratio=mask_ratio, seed=seed)
    return out


def draw_strip(model: MAE, images: Tensor, out: Path, *, mask_ratio: float, seed: int) -> None:
    """Reconstruct ``images`` (B, C, H, W) uint8 under the masks of ``seed`` and write the strip as PNG."""
    device = model.cls_token.device
    noise = uniform(seed, MASKS, 0, torch.arange(len(images)), model.config.patches).to(device)
    picture = strip(reconstruct(model, images.to(device), mask_ratio, noise))
    with write_atomically(out) as file:
        picture.save(file, "PNG")


def weights_file(checkpoint: Path) -> Path:
    """The file of weights that ``checkpoint`` names: itself, or the one in a checkpoint's or a run's folder."""
    if not checkpoint.is_dir():
        return checkpoint
    if (checkpoint / MODEL).is_file():
        open_checkpoint(checkpoint)
        return checkpoint / MODEL
    newest, damaged = find_checkpoint(checkpoint)
    if newest is None:
        raise DataError(f"{checkpoint}: no complete checkpoint in this folder{'; ' + damaged[0] if damaged else ''}")
    return newest.folder / MODEL


def load_images(path: Path, model: MAE, count: int) -> Tensor:
    """The first ``count`` images at ``path``, cut and resized for ``model``: (B, C, H, W) uint8."""
    if (path / JSON_NAME).is_file():
        reader = ShardReader(Index.load(path))
        try:
            found = [(reader.name(i), reader.read(i)) for i in range(min(count, len(reader.index)))]
        except SampleError as error:
            raise DataError(f"{path}: {error}; `fastmae shards verify` names what is damaged") from error
    elif path.is_dir():
        found = [(str(s.path), _read(s.path)) for s in list_images(path)[0][:count]]
    elif path.is_file():
        found = [(str(path), _read(path))]
    else:
        raise InputError(f"{path}: no such image or folder; give an image, a folder of images, or a folder of shards")
    size = model.config.img_size
    images = []
    for name, data in found:
        try:
            pixels = decode(data, model.config.in_chans)
        except DecodeError as error:
            raise DataError(f"{name}: {error}") from error
        images.append(resized_crop(pixels, center_box(*pixels.shape[:2], size), size))
    return torch.stack(images)


def _read(path: Path) -> bytes:
    """The image as shards would store it: upright, eight bits."""
    try:
        return recode(path, Recode(resize=None))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as an image, {error}") from error
