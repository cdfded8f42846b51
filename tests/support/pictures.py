"""Pictures made on the spot."""

import numpy as np


def make_picture(number: int, size: tuple[int, int] = (48, 64)):
    """A smooth picture with a shape in it, (height, width), different for each number; a Pillow image."""
    from PIL import Image

    rng = np.random.default_rng(number)
    y, x = np.mgrid[0 : size[0], 0 : size[1]] / max(size)
    waves = [np.sin(rng.uniform(2, 9) * x + rng.uniform(2, 9) * y + rng.uniform(0, 6)) for _ in range(3)]
    pixels = np.stack(waves, -1) * 90 + 128
    cy, cx, r = rng.uniform(0.2, 0.6, 3)
    pixels[(y - cy) ** 2 + (x - cx) ** 2 < (r / 3) ** 2] = rng.uniform(0, 255, 3)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
