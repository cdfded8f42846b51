"""Pictures of what a model reconstructs while it trains: always of the same images, with the same masks."""

import contextlib
from pathlib import Path

import torch
from torch import Tensor

from fastmae.data.augment import center_box
from fastmae.errors import DataError, InputError, SampleError
from fastmae.images.decode import DecodeError, decode
from fastmae.images.listing import list_images
from fastmae.images.recode import Recode, recode
from fastmae.images.resize import resized_crop
from fastmae.kernels.philox import MASKS, uniform
from fastmae.model.attention.choice import unmeasured
from fastmae.model.mae import MAE
from fastmae.model.pictures import reconstruct, strip
from fastmae.shards.index import JSON_NAME, Index
from fastmae.shards.read import ShardReader
from fastmae.train.distributed.world import World
from fastmae.train.pretrain.log import RunLog
from fastmae.train.step.parallelize import full, is_sharded

_IMAGES = 8


class Drawing:
    """Draws the first images of the data set, or of the first batch if those cannot be read."""

    def __init__(self, data: str, model: MAE, world: World, mask_ratio: float, autocast: torch.dtype | None = None):
        """``autocast``: the run's, so that the model is drawn as it is trained; None without."""
        self.model, self.world, self.mask_ratio, self.autocast = model, world, mask_ratio, autocast
        self._images: Tensor | None = None
        if world.is_main and (Path(data) / JSON_NAME).is_file():
            with contextlib.suppress(DataError):  # the loader reports bad samples; a batch is drawn instead
                self._images = load_images(Path(data), model, _IMAGES)

    def offer(self, images: Tensor) -> None:
        """Images (B, C, H, W) uint8 to draw if there are none yet."""
        if self._images is None and tuple(images.shape[2:]) == self.model.config.img_size:
            self._images = images[:_IMAGES].clone()

    @torch.no_grad()
    def draw(self, step: int, log: RunLog) -> None:
        """Put a picture into ``log``. Every rank takes part: of a sharded model none has all parameters."""
        model = self._full_model() if is_sharded(self.model) else self.model
        if not self.world.is_main or self._images is None:
            return
        images = self._images.to(self.world.device)
        noise = uniform(0, MASKS, 0, torch.arange(len(images)), model.config.patches).to(images.device)
        # Compiling blocks for one picture takes longer than drawing it, and so does measuring a backend, which takes gigabytes.
        with torch.compiler.set_stance("force_eager"), unmeasured(), self._autocast():
            pictures = reconstruct(model, images, self.mask_ratio, noise)
        log.picture(step, strip(pictures))

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.world.device.type, dtype=self.autocast, enabled=self.autocast is not None)

    def _full_model(self) -> MAE:
        state = {name: full(tensor) for name, tensor in self.model.state_dict().items()}
        with torch.random.fork_rng(devices=[self.world.device] if self.world.device.type == "cuda" else []):
            model = MAE(self.model.config).to(self.world.device)
        model.load_state_dict(state)
        return model


def load_images(path: Path, model: MAE, count: int) -> Tensor:
    """The first ``count`` images at ``path``, centre-cropped and resized for ``model``: (B, C, H, W) uint8."""
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
