"""Decoding on the GPU, by torchvision's nvJPEG, where the machine has it.

Its pixels differ from the CPU's by a level or two: another inverse transform, another upsampling of colour. What it cannot
decode goes to the CPU, image by image.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from fastmae.errors import InputError, SampleError
from fastmae.images.decode import decode
from fastmae.optional import require

Decoder = Callable[[list[Tensor]], list[Tensor | str]]
"""JPEGs, uint8 (n,) each on the CPU, to pixels (H, W, 3) uint8 on the device, or the reason why one has none."""


def make_decoder(device: torch.device) -> Decoder:
    """The decoder of ``device``. Raises InputError if that is no GPU, or torchvision is not there or has no nvJPEG."""
    if device.type != "cuda":
        raise InputError(f"decode nvjpeg needs a CUDA device, and this run is on {device.type}; leave --decode out")
    io = require("torchvision.io", "decode nvjpeg", "torchvision")
    simplejpeg = require("simplejpeg", "decoding JPEGs")

    def on_device(jpegs: list[Tensor]) -> list[Tensor]:
        # nvJPEG writes from a stream of its own that waits for nobody, into memory that earlier work here may still use.
        torch.cuda.current_stream(device).synchronize()
        try:
            images = io.decode_jpeg(jpegs, mode=io.ImageReadMode.RGB, device=device)
        except RuntimeError:
            torch.cuda.synchronize(device)  # others of the batch may still be written
            raise
        return [image.permute(1, 2, 0) for image in images]

    def one(jpeg: Tensor) -> Tensor | str:
        try:
            return on_device([jpeg])[0]
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            try:
                return torch.from_numpy(decode(jpeg.numpy().tobytes())).to(device)
            except SampleError as error:
                return str(error)

    def every(jpegs: list[Tensor]) -> list[Tensor | str]:
        try:
            return on_device(jpegs)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # one of them cannot be decoded, and nobody says which
            return [one(jpeg) for jpeg in jpegs]

    probe = simplejpeg.encode_jpeg(np.zeros((16, 16, 3), np.uint8))
    try:
        on_device([torch.frombuffer(bytearray(probe), dtype=torch.uint8)])
    except (RuntimeError, AttributeError) as error:
        raise InputError(f"decode nvjpeg: this torchvision cannot do it ({error}); leave --decode out") from error
    return every
