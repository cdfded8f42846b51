"""``fastmae reconstruct``: draw what a checkpoint reconstructs.

Columns: original, masked, reconstruction, and the reconstruction with the visible patches.
"""

import io
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from fastmae.errors import DataError, InputError
from fastmae.files import write_atomically
from fastmae.kernels.philox import MASKS, uniform
from fastmae.model.config import kept_patches
from fastmae.model.mae import MAE
from fastmae.model.pictures import reconstruct, strip
from fastmae.model.weights import load_model
from fastmae.seeds import check_seed
from fastmae.train.checkpoint.format import MODEL, find_checkpoint, open_checkpoint
from fastmae.train.pretrain.previews import load_images


def reconstruct_images(checkpoint: Path, images: Path, out: Path, *, mask_ratio: float = 0.75, count: int = 8, seed: int = 0,
                       norm_pix_loss: bool | None = None) -> Path:  # fmt: skip
    """Draw up to ``count`` of ``images`` into the picture ``out`` and return it.

    ``checkpoint``: a run, one of its checkpoint folders, or a ``.safetensors`` or ``.pth`` file. ``images``: an image, a
    folder of images, or a folder of indexed shards. Images are centre-cropped to the model's aspect ratio. Raises InputError
    or DataError on a suffix that names no image format, an encoder-only file, an image that cannot be read, or a path that
    cannot be written.
    """
    check_seed(seed)
    if count < 1:
        raise InputError(f"count must be at least 1, got {count}")
    picture_format(out)
    model = load_model(weights_file(checkpoint), norm_pix_loss=norm_pix_loss)
    kept_patches(model.config.patches, mask_ratio)
    draw_strip(model, load_images(images, model, count), out, mask_ratio=mask_ratio, seed=seed)
    return out


def draw_strip(model: MAE, images: Tensor, out: Path, *, mask_ratio: float, seed: int) -> None:
    """Reconstruct ``images`` (B, C, H, W) uint8 with the masks of ``seed`` into ``out``, in the format of its suffix."""
    kind = picture_format(out)
    device = model.cls_token.device
    noise = uniform(seed, MASKS, 0, torch.arange(len(images)), model.config.patches).to(device)
    picture = strip(reconstruct(model, images.to(device), mask_ratio, noise))
    size = f"{picture.width} x {picture.height} pixels"
    encoded = _encode(picture, kind, f"{out}: {kind} cannot hold {size}; draw fewer images with --count, or write .png")
    with write_atomically(out) as file:
        file.write(encoded)


def picture_format(out: Path) -> str:
    """Pillow's name of the format that the suffix of ``out`` stands for; PNG without a suffix. Raises InputError on others."""
    if not out.suffix:
        return "PNG"
    kind = Image.registered_extensions().get(out.suffix.lower(), "")
    wrong = f"{out}: suffix {out.suffix} is no image format that can be written here; use .png, .jpg, .webp, .tiff or .pdf"
    if kind not in Image.SAVE:
        raise InputError(wrong)
    _encode(Image.new("RGB", (1, 1)), kind, wrong)  # some refuse colours, others need a library
    return kind


def _encode(picture: Image.Image, kind: str, refusal: str) -> bytes:
    """``picture`` as a file of format ``kind``. Raises InputError(``refusal``) where the format cannot hold it."""
    data = io.BytesIO()
    try:
        picture.save(data, kind)
    except (OSError, ValueError) as error:
        raise InputError(refusal) from error
    return data.getvalue()


def weights_file(checkpoint: Path) -> Path:
    """The weights of ``checkpoint``: the file itself, or the one in the folder of a checkpoint or a run."""
    if not checkpoint.exists():
        raise DataError(
            f"{checkpoint}: no such file or folder; give a run, one of its checkpoints, or a .safetensors or .pth file"
        )
    if not checkpoint.is_dir():
        return checkpoint
    if (checkpoint / MODEL).is_file():
        open_checkpoint(checkpoint)
        return checkpoint / MODEL
    newest, damaged = find_checkpoint(checkpoint)
    if newest is None:
        raise DataError(f"{checkpoint}: no complete checkpoint in this folder{'; ' + damaged[0] if damaged else ''}")
    return newest.folder / MODEL
