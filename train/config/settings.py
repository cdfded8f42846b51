"""From the command line's flags to a recipe: a preset or a named recipe, with single settings overridden."""

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated

import tyro

from fastmae.errors import InputError
from fastmae.model.config import preset as preset_config
from fastmae.train.config.recipes import RECIPES, Recipe
from fastmae.train.config.run import Run

PresetName = Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="[PRESET]")]


@dataclass(frozen=True, kw_only=True)
class PretrainSettings(Run):
    """Pretrain a masked autoencoder on shards. Give a preset, a recipe, or both if they agree; a setting given by itself
    overrides theirs."""

    preset: PresetName = None
    """Model size: tiny, small, base, large or huge."""
    recipe: str | None = None
    """reference-b, -l, -h or paper-b, -l, -h: the published settings, effective batch included. Without one: the
    reference's settings at the batch size given."""
    img_size: tuple[int, ...] | None = None
    """Pixels: one number, or height and width."""
    patch_size: int | None = None
    """Side of a patch, pixels."""
    in_chans: int | None = None
    """Image channels, 3 or 1."""
    decoder_embed_dim: int | None = None
    """Decoder width."""
    decoder_depth: int | None = None
    """Decoder blocks."""
    decoder_num_heads: int | None = None
    """Decoder attention heads."""
    norm_pix_loss: bool | None = None
    """Predict normalised pixels (the recipes' default) or plain ones."""
    attention: str | None = None
    """Attention backend: auto, xformers, sdpa, flash, cudnn, efficient or math."""
    residual: str | None = None
    """Residual stream under bf16 autocast: fp32, the reference's, or bf16, which is faster and rounds more."""
    checkpointing: bool | None = None
    """Compute each block again in the backward pass instead of keeping its activations: less memory, slower."""
    mask_ratio: float | None = None
    """Share of patches removed, between 0 and 1."""
    epochs: float | None = None
    """Visits to each sample: passes over the data, times the views."""
    steps: int | None = None
    """Optimizer steps, instead of epochs."""
    warmup_epochs: float | None = None
    """Epochs of linear warm-up; by default the recipe's share of the epochs, and no more than its own."""
    effective_batch: int | None = None
    """Images per optimizer step over all processes; what exceeds them is accumulated."""
    blr: float | None = None
    """Base learning rate, per 256 images of effective batch."""
    min_lr: float | None = None
    """Final learning rate."""
    weight_decay: float | None = None
    """AdamW's weight decay."""
    crop_scale: tuple[float, float] | None = None
    """Least and greatest share of the image that a crop covers."""
    flip: bool | None = None
    """Mirror half of the images."""
    views: int | None = None
    """Crops of each decoded image, each with its mask: less decoding, less variety; a pass counts as so many epochs."""
    shuffle_window: int | None = None
    """Shards mixed at a time, for disks that must read in sequence; by default all samples are mixed."""
    progressive: tuple[str, ...] | None = None
    """Progressive resolution, SHARE:PIXELS or SHARE:HEIGHTxWIDTH, as in 0:160 0.5:192 0.8:224: from which share of the run on
    images have which size."""
    seed: int | None = None
    """Of weights, order, crops and masks."""

    def __post_init__(self):
        """Nothing: ``run`` and ``resolve`` check, where an error is ours to word and not the argument parser's."""

    def run(self) -> Run:
        """The part that says where and how fast."""
        return Run(**{f.name: getattr(self, f.name) for f in fields(Run)})

    def resolve(self, world_size: int) -> Recipe:
        """The recipe of a run over ``world_size`` processes. Raises InputError on settings that do not fit together."""
        base = self._base(world_size)
        model = {name: getattr(self, name) for name in _MODEL if getattr(self, name) is not None}
        if self.img_size is not None:
            if len(self.img_size) not in (1, 2):
                raise InputError(f"img-size takes one number or height and width, got {self.img_size}")
            model["img_size"] = self.img_size if len(self.img_size) == 2 else self.img_size * 2
        if "in_chans" in model:  # the statistics of three channels do not fit another number
            model |= {"pixel_mean": None, "pixel_std": None}
        training = {name: getattr(self, name) for name in _TRAINING if getattr(self, name) is not None}
        augment = {name: value for name, value in (("scale", self.crop_scale), ("flip", self.flip)) if value is not None}
        if self.progressive is not None:
            training["progressive"] = tuple(_stage(text) for text in self.progressive)
        if self.epochs is not None and self.warmup_epochs is None:
            training["warmup_epochs"] = min(base.warmup_epochs, self.epochs * base.warmup_epochs / base.epochs)
        return replace(base, model=replace(base.model, **model), augment=replace(base.augment, **augment), **training)

    def _base(self, world_size: int) -> Recipe:
        if self.preset is None and self.recipe is None:
            raise InputError("give a preset (tiny, small, base, large, huge) or --recipe")
        if self.recipe is None:
            return Recipe(model=preset_config(self.preset, norm_pix_loss=True), effective_batch=self.batch_size * world_size)
        if self.recipe not in RECIPES:
            raise InputError(f"recipe must be one of {', '.join(RECIPES)}, got {self.recipe!r}")
        recipe = RECIPES[self.recipe]()
        if self.preset is not None and preset_config(self.preset, norm_pix_loss=True) != recipe.model:
            raise InputError(f"recipe {self.recipe} is not for preset {self.preset}; leave the preset out")
        return recipe


@dataclass(frozen=True, kw_only=True)
class DoctorSettings(PretrainSettings):
    """Print versions, devices, and which kernels and attention are used and why not faster ones. Under a launcher, and with the
    flags of a run: what would make that run fail, before it starts."""

    distributed: bool = False
    """All processes of a launcher look together; so they do without it where a launcher has started several."""
    data: str | None = None
    """As for pretrain: whether every process reads the same."""
    out: Path | None = None
    """As for pretrain: whether it is the same folder for every process, and has room."""

    def run(self) -> Run:
        """Where and how fast; what was not given is empty."""
        given = {f.name: getattr(self, f.name) for f in fields(Run)}
        return Run(**{**given, "data": self.data or "", "out": self.out or Path()})

    @property
    def is_of_run(self) -> bool:
        """Whether a run's model, data or output is to be looked at."""
        return any(value is not None for value in (self.preset, self.recipe, self.data, self.out))


def _stage(text: str) -> tuple[float, tuple[int, int]]:
    """(share, (height, width)) of "0.5:192" or "0.5:192x256"."""
    share, _, size = text.partition(":")
    height, _, width = size.partition("x")
    try:
        return float(share), (int(height), int(width or height))
    except ValueError:
        raise InputError(f"progressive takes SHARE:PIXELS or SHARE:HEIGHTxWIDTH, as in 0.5:192, got {text!r}") from None


_MODEL = ("patch_size", "in_chans", "decoder_embed_dim", "decoder_depth", "decoder_num_heads", "norm_pix_loss", "attention",
          "residual", "checkpointing")  # fmt: skip
_TRAINING = ("mask_ratio", "epochs", "steps", "warmup_epochs", "effective_batch", "blr", "min_lr", "weight_decay", "views",
             "shuffle_window", "seed")  # fmt: skip
