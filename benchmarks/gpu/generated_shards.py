"""``python generated_shards.py FOLDER COUNT``: shards of generated images, where there are no photographs.

JPEGs of 256 x 256 pixels and about 30 kB, like photographs of that size, so that reading and decoding cost as much.
"""

import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from fastmae.images.recode import Recode
from fastmae.shards.build import write_shards

_SIDE, _DIFFERENT = 256, 128


def make_shards(folder: Path, count: int) -> None:
    """Write ``count`` images, of which 128 differ, to shards in ``folder``."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(count):
            path = Path(scratch, f"{number:06d}.jpg")
            if number < _DIFFERENT:
                coarse = Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).resize(
                    (_SIDE, _SIDE), Image.BICUBIC
                )
                grain = rng.normal(0, 12, (_SIDE, _SIDE, 3))
                Image.fromarray((np.asarray(coarse) + grain).clip(0, 255).astype(np.uint8)).save(path, quality=90)
            else:
                shutil.copyfile(Path(scratch, f"{number % _DIFFERENT:06d}.jpg"), path)
        write_shards(Path(scratch), folder, Recode(resize=None), samples_per_shard=512)


if __name__ == "__main__":
    make_shards(Path(sys.argv[1]), int(sys.argv[2]))
