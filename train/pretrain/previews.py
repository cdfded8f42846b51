"""Pictures of what a model reconstructs while it trains: always of the same images, under the same masks."""

import contextlib
from pathlib import Path

import torch
from torch import Tensor

from fastmae.errors import DataError
from fastmae.kernels.philox import MASKS, uniform
from fastmae.model.attention.choice import unmeasured
from fastmae.model.mae import MAE
from fastmae.model.pictures import reconstruct, strip
from fastmae.shards.index import JSON_NAME
from fastmae.train.distributed.world import World
from fastmae.train.pretrain.log import RunLog
from fastmae.train.pretrain.reconstruct import load_images
from fastmae.train.step.parallelize import is_cut, whole

_IMAGES = 8


class Drawing:
    """Draws the first images of the data set, or of the first batch where those cannot be had."""

    def __init__(self, data: str, model: MAE, world: World, mask_ratio: float, autocast: torch.dtype | None = None):
        """``autocast``: the run's, so that the model is drawn as it is trained; None without."""
        self.model, self.world, self.mask_ratio, self.autocast = model, world, mask_ratio, autocast
        self._images: Tensor | None = None
        if world.is_main and (Path(data) / JSON_NAME).is_file():
            with contextlib.suppress(DataError):  # a bad sample is the loader's to tell; a batch has others
                self._images = load_images(Path(data), model, _IMAGES)

    def offer(self, images: Tensor) -> None:
        """Images (B, C, H, W) uint8 to draw where there are none yet."""
        if self._images is None and tuple(images.shape[2:]) == self.model.config.img_size:
            self._images = images[:_IMAGES].clone()

    @torch.no_grad()
    def draw(self, step: int, log: RunLog) -> None:
        """Put a picture into ``log``. Every process takes part: of a cut model none has all."""
        model = self._whole_model() if is_cut(self.model) else self.model
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

    def _whole_model(self) -> MAE:
        state = {name: whole(tensor) for name, tensor in self.model.state_dict().items()}
        with torch.random.fork_rng(devices=[self.world.device] if self.world.device.type == "cuda" else []):
            model = MAE(self.model.config).to(self.world.device)
        model.load_state_dict(state)
        return model
