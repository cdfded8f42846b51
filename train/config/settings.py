"""From the command line's flags to a recipe: a preset or a named recipe, with single settings overridden."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from fastmae.data.augment import Augment
from fastmae.errors import InputError
from fastmae.model.config import BACKENDS, PRESETS, ModelConfig
from fastmae.model.config import preset as preset_config
from fastmae.train.config.recipes import RECIPES, Recipe
from fastmae.train.config.run import Run, one_of, optional

_PRESET = Annotated[
    Literal[*PRESETS] | None,
    tyro.conf.Positional,
    one_of(tuple(PRESETS)),
    tyro.conf.arg(name="preset", metavar="[PRESET]", help_behavior_hint="(required without --recipe, unless a run is resumed)"),
]
_RECIPES = {name: Recipe(model=preset_config(name, norm_pix_loss=True)) for name in PRESETS}
_RECIPES |= {name: make() for name, make in RECIPES.items()}


def _of_recipe(kind: type, metavar: str, get: Callable[[Recipe], object]) -> type:
    """A setting whose default, which ``get`` finds, depends on the preset or recipe: "16 (huge, reference-h, paper-h: 14)"."""
    names: dict[object, list[str]] = {}
    for name, recipe in _RECIPES.items():
        names.setdefault(get(recipe), []).append(name)
    usual = max(names, key=lambda value: len(names[value]))
    others = "; ".join(f"{', '.join(of)}: {value}" for value, of in names.items() if value != usual)
    return optional(kind, metavar, f"{usual} ({others})" if others else f"{usual}")


@dataclass(frozen=True, kw_only=True)
class PretrainSettings(Run):
    """Pretrain a masked autoencoder on shards. Give a preset, a recipe, or both if they agree; a setting given by itself
    overrides theirs."""

    data: optional(str, "STR", "that of the run that is resumed") = None
    """A folder of shards, or paths or URLs of tars with {000..999} in them."""
    preset: _PRESET = None
    """Model size: tiny, small, base, large or huge."""
    recipe: optional(Literal[*RECIPES], f"{{{','.join(RECIPES)}}}", "none") = None
    """The published settings, effective batch included. Without one: the reference's settings at the batch size given."""
    img_size: tuple[int, ...] = (ModelConfig.img_size,)
    """Pixels: one number, or height and width."""
    patch_size: _of_recipe(int, "INT", lambda recipe: recipe.model.patch_size) = None
    """Side of a patch, pixels."""
    in_chans: int = ModelConfig.in_chans
    """Image channels, 3 or 1."""
    decoder_embed_dim: _of_recipe(int, "INT", lambda recipe: recipe.model.decoder_embed_dim) = None
    """Decoder width."""
    decoder_depth: _of_recipe(int, "INT", lambda recipe: recipe.model.decoder_depth) = None
    """Decoder blocks."""
    decoder_num_heads: _of_recipe(int, "INT", lambda recipe: recipe.model.decoder_num_heads) = None
    """Decoder attention heads."""
    norm_pix_loss: bool = True
    """Predict normalised pixels, or plain ones."""
    attention: Literal["auto", *BACKENDS] = ModelConfig.attention
    """Attention backend."""
    fused: Annotated[str, tyro.conf.arg(metavar="{auto,off,NAME,NAME...}")] = ModelConfig.fused
    """Fused operations of the blocks: auto (those that a first run on a GPU measures to be faster), off, or names joined by
    commas: linear, add_norm, gelu."""
    residual: Literal["fp32", "bf16"] = ModelConfig.residual
    """Residual stream under bf16 autocast: fp32, the reference's, or bf16, which is faster and rounds more."""
    checkpointing: bool = ModelConfig.checkpointing
    """Compute each block again in the backward pass instead of keeping its activations: less memory, slower."""
    mask_ratio: float = Recipe.mask_ratio
    """Share of patches removed, between 0 and 1."""
    epochs: _of_recipe(float, "FLOAT", lambda recipe: recipe.epochs) = None
    """Visits to each sample: passes over the data, times the views."""
    steps: optional(int, "INT", "those of the epochs") = None
    """Optimizer steps, instead of epochs."""
    warmup_epochs: optional(float, "FLOAT", f"{Recipe.warmup_epochs}, or the recipe's share of fewer --epochs") = None
    """Epochs of linear warm-up from 0."""
    effective_batch: optional(int, "INT", f"{Recipe.effective_batch} of a recipe; else batch size x processes") = None
    """Images per optimizer step over all processes; what exceeds them is accumulated."""
    blr: float = Recipe.blr
    """Base learning rate, per 256 images of effective batch."""
    min_lr: float = Recipe.min_lr
    """Final learning rate, at most the peak."""
    weight_decay: float = Recipe.weight_decay
    """AdamW's weight decay."""
    crop_scale: tuple[float, float] = Augment.scale
    """Least and greatest share of the image that a crop covers."""
    flip: bool = Augment.flip
    """Mirror half of the images."""
    views: int = Recipe.views
    """Crops of each decoded image, each with its mask: less decoding, less variety; a pass counts as so many epochs."""
    shuffle_window: optional(int, "INT", "all") = None
    """Shards mixed at a time, for disks that must read in sequence."""
    progressive: optional(tuple[str, ...], "SHARE:PIXELS", "one size") = None
    """Progressive resolution, SHARE:PIXELS or SHARE:HEIGHTxWIDTH, as in 0:160 0.5:192 0.8:224: from which share of the run on
    images have which size."""
    seed: int = Recipe.seed
    """Of weights, order, crops and masks."""

    def __post_init__(self):
        """Nothing: ``run`` and ``resolve`` check, where an error is ours to word and not the argument parser's."""

    def run(self) -> Run:
        """The part that says where and how fast. Raises InputError without data."""
        if self.data is None:
            raise InputError(
                "give --data: a folder of shards, or paths or URLs of tars; a resumed run has it in its settings.json"
            )
        return Run(**{f.name: getattr(self, f.name) for f in fields(Run)})

    def resolve(self, world_size: int) -> Recipe:
        """The recipe of a run over ``world_size`` processes. Raises InputError on settings that do not fit together."""
        base = self._base(world_size)
        model = {name: getattr(self, name) for name in MODEL if getattr(self, name) is not None}
        if len(self.img_size) not in (1, 2):
            raise InputError(f"img-size takes one number or height and width, got {self.img_size}")
        model["img_size"] = self.img_size if len(self.img_size) == 2 else self.img_size * 2
        model |= {"pixel_mean": None, "pixel_std": None}  # those of the channels asked for
        training = {name: getattr(self, name) for name in TRAINING if getattr(self, name) is not None}
        if self.progressive is not None:
            training["progressive"] = tuple(_stage(text) for text in self.progressive)
        if self.epochs is not None and self.warmup_epochs is None:
            training["warmup_epochs"] = min(base.warmup_epochs, self.epochs * base.warmup_epochs / base.epochs)
        augment = replace(base.augment, scale=self.crop_scale, flip=self.flip)
        return replace(base, model=replace(base.model, **model), augment=augment, **training)

    def _base(self, world_size: int) -> Recipe:
        if self.preset is None and self.recipe is None:
            raise InputError(
                "give a preset (tiny, small, base, large, huge) or --recipe; a run of a model of other sizes is resumed as it "
                "was started, by fastmae.train.api"
            )
        if self.recipe is None:
            return Recipe(model=preset_config(self.preset, norm_pix_loss=True), effective_batch=self.batch_size * world_size)
        recipe = RECIPES[self.recipe]()
        if self.preset is not None and preset_config(self.preset, norm_pix_loss=True) != recipe.model:
            raise InputError(f"recipe {self.recipe} is not for preset {self.preset}; remove one of the two")
        return recipe


@dataclass(frozen=True, kw_only=True)
class DoctorSettings(PretrainSettings):
    """Print versions, devices, and which kernels and attention are used and why not faster ones. Under a launcher, and with the
    flags of a run: what would make that run fail, before it starts."""

    distributed: bool = False
    """Check all processes of a launcher together, even if it has started one; with several that is the default."""
    data: optional(str, "STR", "not checked") = None
    """As for pretrain: whether every process reads the same."""
    out: optional(Path, "PATH", "not checked") = None
    """As for pretrain: whether it is the same folder for every process, and has room."""

    def run(self) -> Run:
        """Where and how fast; what was not given is empty."""
        given = {f.name: getattr(self, f.name) for f in fields(Run)}
        return Run(**{**given, "data": self.data or "", "out": self.out or Path()})

    @property
    def is_of_run(self) -> bool:
        """Whether a run's model, data or output is to be looked at."""
        return any(value is not None for value in (self.preset, self.recipe, self.data, self.out))


def switches(arguments: list[str]) -> list[str]:
    """``arguments`` of a run with ``--flip True`` and ``--flip=False``, as of old, as ``--flip`` and ``--no-flip``."""
    found: list[str] = []
    for argument in arguments:
        name, is_joined, value = argument.partition("=")
        if not is_joined and found:
            name, value = found[-1], argument
        if name in ("--norm-pix-loss", "--checkpointing", "--flip") and value in ("True", "False"):
            found = found if is_joined else found[:-1]
            found.append(name if value == "True" else f"--no-{name[2:]}")
        else:
            found.append(argument)
    return found


def _stage(text: str) -> tuple[float, tuple[int, int]]:
    """(share, (height, width)) of "0.5:192" or "0.5:192x256"."""
    share, _, size = text.partition(":")
    height, _, width = size.partition("x")
    try:
        return float(share), (int(height), int(width or height))
    except ValueError:
        raise InputError(f"progressive takes SHARE:PIXELS or SHARE:HEIGHTxWIDTH, as in 0.5:192, got {text!r}") from None


# The fields of ``ModelConfig`` and of ``Recipe`` that have a flag of the same name.
MODEL = ("patch_size", "in_chans", "decoder_embed_dim", "decoder_depth", "decoder_num_heads", "norm_pix_loss", "attention",
          "fused", "residual", "checkpointing")  # fmt: skip
TRAINING = ("mask_ratio", "epochs", "steps", "warmup_epochs", "effective_batch", "blr", "min_lr", "weight_decay", "views",
             "shuffle_window", "seed")  # fmt: skip
