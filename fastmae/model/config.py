"""The config of a masked autoencoder: one frozen dataclass, validated when it is made. Imports no torch.

Sizes are those of He et al. 2021 (arXiv 2111.06377), section 4 and appendix A.1, with the reference's names.
"""

import dataclasses
import json
import math
from dataclasses import dataclass

from fastmae.errors import InputError

BACKENDS = ("short", "xformers", "sdpa", "flash", "cudnn", "efficient", "math")
"""Attention backends. ``short`` is ``fastmae.kernels.short_attention``; ``sdpa`` lets torch choose; ``flash``, ``cudnn``,
``efficient`` and ``math`` are its kernels."""
FUSED = ("linear", "add_norm", "gelu")
"""Fused operations of a block (``fastmae.model.block.fused``): weights cast together and their gradients written in float32;
residual sum and LayerNorm in one; the gradient of GELU with that of the bias."""
_OF_SPEED = ("attention", "fused", "residual", "checkpointing")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A model's shape and objective. Raises InputError on a value that cannot work."""

    # What changes the result.
    img_size: int | tuple[int, int] = 224
    """Pixels, one number for a square or (height, width); a multiple of ``patch_size``."""
    patch_size: int = 16
    """Side of a square patch, pixels."""
    in_chans: int = 3
    """Channels of an image."""
    embed_dim: int = 768
    """Encoder width, a multiple of 4 (sin-cos positions) and of ``num_heads``."""
    depth: int = 12
    """Encoder blocks."""
    num_heads: int = 12
    """Attention heads of an encoder block."""
    decoder_embed_dim: int = 512
    """Decoder width, a multiple of 4 and of ``decoder_num_heads``."""
    decoder_depth: int = 8
    """Decoder blocks, at least 1."""
    decoder_num_heads: int = 16
    """Attention heads of a decoder block."""
    mlp_ratio: float = 4.0
    """Hidden width of a block's MLP over its width."""
    norm_pix_loss: bool = False
    """Predict pixels normalised by the mean and deviation of their patch, rather than plain pixels."""
    pixel_mean: tuple[float, ...] | None = None
    """Per channel, in units of [0, 1]; subtracted from uint8 images. None: ImageNet's for 3 channels, else 0.5."""
    pixel_std: tuple[float, ...] | None = None
    """Per channel, in units of [0, 1]; uint8 images are divided by it. None: ImageNet's for 3 channels, else 0.25."""

    # What changes speed and memory, and the result by rounding at most.
    attention: str = "auto"
    """Attention backend: auto, or one of ``BACKENDS``."""
    fused: str = "auto"
    """Fused operations of the blocks: auto, which takes those that were measured to be faster on this device; off; or names of
    ``FUSED`` with commas between them."""
    residual: str = "fp32"
    """The residual stream's dtype under autocast: fp32, the reference's, or bf16, which halves its memory and traffic and
    rounds every block's sum to 8 bits. Without autocast it changes nothing."""
    checkpointing: bool = False
    """Keep only each block's input and recompute the block in the backward pass: less memory, a third more work, bitwise
    identical results."""

    def __post_init__(self):
        size = (self.img_size, self.img_size) if isinstance(self.img_size, int) else tuple(self.img_size)
        object.__setattr__(self, "img_size", size)
        is_rgb = self.in_chans == 3
        defaults = {"pixel_mean": IMAGENET_MEAN if is_rgb else (0.5,) * self.in_chans,
                    "pixel_std": IMAGENET_STD if is_rgb else (0.25,) * self.in_chans}  # fmt: skip
        for name, default in defaults.items():
            value = getattr(self, name)
            object.__setattr__(self, name, default if value is None else tuple(float(v) for v in value))
        self._check()

    def _check(self):
        positive = ("patch_size", "in_chans", "embed_dim", "depth", "num_heads",
                    "decoder_embed_dim", "decoder_depth", "decoder_num_heads", "mlp_ratio")  # fmt: skip
        for name in positive:
            value = getattr(self, name)
            if not 0 < value < math.inf or (name != "mlp_ratio" and type(value) is not int):
                raise InputError(f"{name} must be a positive {'number' if name == 'mlp_ratio' else 'integer'}, got {value}")
        p = self.patch_size
        if len(self.img_size) != 2 or any(s <= 0 or s % p for s in self.img_size):
            nearest = sorted({max(n, 1) * p for s in self.img_size for n in (s // p, s // p + 1)})
            raise InputError(
                f"image size {self.img_size} must be (height, width), each a positive multiple of the patch size {p}; the "
                f"nearest are {nearest}"
            )
        if self.attention not in ("auto", *BACKENDS):
            raise InputError(f"attention must be one of auto, {', '.join(BACKENDS)}, got {self.attention!r}")
        names = self.fused.split(",") if isinstance(self.fused, str) else [None]
        if self.fused not in ("auto", "off") and (not set(names) <= set(FUSED) or len(set(names)) < len(names)):
            raise InputError(f"fused must be auto, off, or some of {', '.join(FUSED)} joined by commas, got {self.fused!r}")
        if self.residual not in ("fp32", "bf16"):
            raise InputError(f"residual must be fp32 or bf16, got {self.residual!r}")
        for width, heads in (("embed_dim", "num_heads"), ("decoder_embed_dim", "decoder_num_heads")):
            if getattr(self, width) % getattr(self, heads) or getattr(self, width) % 4:
                raise InputError(
                    f"{width} must be a multiple of {heads} ({getattr(self, heads)}) and of 4, got {getattr(self, width)}"
                )
        for name in ("pixel_mean", "pixel_std"):
            if len(getattr(self, name)) != self.in_chans:
                raise InputError(f"{name} must have {self.in_chans} values, one a channel, got {getattr(self, name)}")
        if min(self.pixel_std) <= 0:
            raise InputError(f"pixel_std must be positive, got {self.pixel_std}")
        if self.norm_pix_loss and self.patch_values < 2:
            raise InputError("norm_pix_loss needs patches of at least 2 values: the variance of one is undefined")

    @property
    def architecture(self) -> dict[str, object]:
        """The fields that change the result: all but those of speed and memory."""
        fields = dataclasses.asdict(self)
        return {name: value for name, value in fields.items() if name not in _OF_SPEED}

    @property
    def grid(self) -> tuple[int, int]:
        """Patches per image, (rows, columns)."""
        return self.img_size[0] // self.patch_size, self.img_size[1] // self.patch_size

    @property
    def patches(self) -> int:
        """Patches per image, L."""
        return self.grid[0] * self.grid[1]

    @property
    def patch_values(self) -> int:
        """Pixel values of a patch, P = C p p."""
        return self.in_chans * self.patch_size**2

    def to_json(self) -> str:
        """The config as a JSON object; ``from_json`` reads it back equal."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "ModelConfig":
        """Read what ``to_json`` wrote. Raises InputError on unknown fields and wrong types."""
        try:
            fields = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InputError(f"model config is damaged, {error}: {text[:40]!r}") from error
        if not isinstance(fields, dict):
            raise InputError(f"model config is damaged, not a JSON object: {text[:40]!r}")
        unknown = set(fields) - {f.name for f in dataclasses.fields(cls)}
        if unknown:
            raise InputError(f"model config has unknown fields {sorted(unknown)}: it was written by a newer fastmae")
        try:
            return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})
        except InputError:
            raise
        except (TypeError, ValueError) as error:  # a string in place of a number
            raise InputError(f"model config is damaged, {error}: {text[:40]!r}") from error


def kept_patches(patches: int, mask_ratio: float) -> int:
    """K, how many of ``patches`` stay visible. Raises InputError unless some are visible and some masked."""
    if not 0 < mask_ratio < 1:
        raise InputError(f"mask ratio must lie strictly between 0 and 1, got {mask_ratio}; the paper's is 0.75")
    K = int(patches * (1 - mask_ratio))
    if not 0 < K < patches:
        raise InputError(
            f"mask ratio {mask_ratio} keeps {K} of {patches} patches, but at least one must be visible and one masked: "
            "choose another ratio, a larger image or a smaller patch"
        )
    return K


_NARROW_DECODER = {"decoder_embed_dim": 256, "decoder_depth": 4, "decoder_num_heads": 8}

# Encoder sizes: base, large and huge are the paper's; tiny and small are DeiT's, with a decoder of matching size.
PRESETS = {
    "tiny": {"patch_size": 16, "embed_dim": 192, "depth": 12, "num_heads": 3, **_NARROW_DECODER},
    "small": {"patch_size": 16, "embed_dim": 384, "depth": 12, "num_heads": 6, **_NARROW_DECODER},
    "base": {"patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12},
    "large": {"patch_size": 16, "embed_dim": 1024, "depth": 24, "num_heads": 16},
    "huge": {"patch_size": 14, "embed_dim": 1280, "depth": 32, "num_heads": 16},
}


def preset(name: str, **overrides) -> ModelConfig:
    """The config of ``name``, one of ``PRESETS``, with any field overridden. Raises InputError on an unknown name."""
    if name not in PRESETS:
        raise InputError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}")
    return ModelConfig(**{**PRESETS[name], **overrides})
