"""Photographs to compute gradients on: noise has no edges, no flat sky, and none of their patches' small variances."""

import itertools
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastmae.model.mae import MAE

_SPECTRUM = 60.0  # grey levels of a generated image's standard deviation


def photographs(model: MAE, count: int, data: Path | None = None) -> tuple[Tensor, str]:
    """``count`` images for ``model``, (B, C, H, W) uint8 on the CPU, always the same, and their source.

    From ``data``, a folder of shards, if given; else crops of the photographs that come with scikit-image and scikit-learn;
    else generated images. Raises InputError or DataError on a folder that cannot be read.
    """
    if data is not None:
        from fastmae.train.pretrain.previews import load_images  # with it come the packages that read data

        found = load_images(data, model, count)
        times = -(-count // len(found))
        return found.repeat(times, 1, 1, 1)[:count], f"{len(found)} images of {data.name}"
    try:
        return _bundled(model, count)
    except (ImportError, ValueError) as error:  # InputError is one
        return generated(model.config.in_chans, model.config.img_size, count), f"generated images, because {error}"


def _bundled(model: MAE, count: int) -> tuple[Tensor, str]:
    """Random crops of the demo's photographs, drawn as for training. Raises ImportError or InputError if they are not here."""
    from fastmae.data.augment import DRAWS, Augment, draw_crop
    from fastmae.images.decode import decode
    from fastmae.images.photographs import find_photographs
    from fastmae.images.recode import Recode, recode
    from fastmae.images.resize import resized_crop

    pictures = [decode(recode(path, Recode(resize=None)), model.config.in_chans) for path in find_photographs()]
    numbers = np.random.default_rng(0).random((count, DRAWS))
    crops = []
    for draws, pixels in zip(numbers, itertools.cycle(pictures)):
        box, flip = draw_crop(draws, *pixels.shape[:2], Augment())
        crops.append(resized_crop(pixels, box, model.config.img_size, flip))
    return torch.stack(crops), f"{count} crops of {len(pictures)} photographs of scikit-image and scikit-learn"


def generated(channels: int, size: tuple[int, int], count: int) -> Tensor:
    """Noise with the spectrum of photographs, amplitudes proportional to 1 / frequency: (B, C, H, W) uint8."""
    generator = torch.Generator().manual_seed(0)
    y, x = (torch.fft.fftfreq(n) * n for n in size)
    frequency = (y[:, None] ** 2 + x**2).sqrt().clamp(min=1)
    noise = torch.randn(count, channels, *size, generator=generator)
    waves = torch.fft.ifft2(torch.fft.fft2(noise) / frequency).real
    waves = waves / waves.std(dim=(2, 3), keepdim=True)
    return (127.5 + _SPECTRUM * waves).round().clamp(0, 255).to(torch.uint8)
