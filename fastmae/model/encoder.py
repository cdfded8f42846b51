"""The encoder: a vision transformer that may be shown only some of an image's patches.

    tokens = [cls, W pixels(patch) + b + pos(patch), ...];    features = norm(blocks(tokens))

Source: He et al. 2021 (arXiv 2111.06377), section 3 "MAE encoder"; parameter names are those of timm's ViT.
"""

import torch
from torch import Tensor, nn

from fastmae.kernels import gather_patches
from fastmae.model.blocks import LAYER_NORM_EPS, Block, residual_dtype, run_block
from fastmae.model.config import ModelConfig
from fastmae.model.linear import linear
from fastmae.model.positions import sincos_positions


class PatchEmbed(nn.Module):
    """Patches to tokens: a convolution whose stride is its size. Weight (D, C, p, p)."""

    def __init__(self, in_chans: int, patch_size: int, dim: int):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        """Every patch: (B, C, H, W) -> (B, L, D). As a linear layer, so that it rounds as the fast path does: on GPUs
        torch's float32 convolutions use TF32 by default and its linear layers do not."""
        B, C, H, W = images.shape
        p = self.proj.kernel_size[0]
        pixels = images.reshape(B, C, H // p, p, W // p, p).permute(0, 2, 4, 1, 3, 5).reshape(B, -1, C * p * p)
        return self.embed_pixels(pixels)

    def embed_pixels(self, pixels: Tensor) -> Tensor:
        """The same map on patches already gathered, channel slowest: (B, K, C p p) -> (B, K, D)."""
        return linear(pixels, self.proj.weight.flatten(1), self.proj.bias)


class Encoder(nn.Module):
    """Vision transformer with a class token and fixed sin-cos positions."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        D = config.embed_dim
        self.cls_token = nn.Parameter(torch.zeros(1, 1, D))
        # A parameter, not a buffer, so that it stands among the reference's parameters; loaded tables are kept.
        self.pos_embed = nn.Parameter(sincos_positions(D, config.grid), requires_grad=False)
        self.patch_embed = PatchEmbed(config.in_chans, config.patch_size, D)
        self.blocks = nn.ModuleList(Block(D, config.num_heads, config.mlp_ratio, config.attention) for _ in range(config.depth))
        self.norm = nn.LayerNorm(D, eps=LAYER_NORM_EPS)
        self.sizes = {config.img_size}
        self.register_buffer("pixel_mean", torch.tensor(config.pixel_mean), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(config.pixel_std), persistent=False)

    def encode(self, images: Tensor) -> Tensor:
        """Features of all patches, no mask: (B, 1 + L, D), class token first. ``images`` as in ``normalize``."""
        return self.transform(self.patch_embed(self.normalize(images)) + self.pos_embed[:, 1:])

    def encode_visible(self, images: Tensor, ids_keep: Tensor) -> Tensor:
        """Features of the patches ``ids_keep`` (B, K) int32 alone: (B, 1 + K, D). Other patches are never read.

        ``images`` (B, C, H, W), uint8 or floating point normalised already; of the config's size or one of ``add_size``.
        """
        self.check_size(images, self.sizes)
        device = images.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.cls_token.dtype
        pixels = gather_patches(images, ids_keep, self.config.patch_size, *self.pixel_statistics(images), dtype=dtype)
        positions = self.positions("pos_embed", images.shape[2:])
        return self.transform(self.patch_embed.embed_pixels(pixels) + positions[0, 1:][ids_keep])

    def transform(self, tokens: Tensor) -> Tensor:
        """Class token, blocks and final norm on embedded tokens: (B, N, D) -> (B, 1 + N, D)."""
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(tokens.shape[0], -1, -1)
        x = torch.cat([cls, tokens], dim=1)
        x = x.to(residual_dtype(x, self.config.residual))
        for block in self.blocks:
            x = run_block(block, x, checkpointing=self.config.checkpointing)
        return self.norm(x)

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 images (B, C, H, W) as floats less the config's mean over its std; floating-point ones as they are.

        Raises ValueError if the shape is not the config's.
        """
        self.check_size(images)
        if images.is_floating_point():
            return images
        mean, std = self.pixel_statistics(images)
        return (images / 255 - mean[:, None, None]) / std[:, None, None]

    def pixel_statistics(self, images: Tensor) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """Mean and std to be applied to ``images`` by a kernel: the config's for uint8, none for normalised floats."""
        return (None, None) if images.is_floating_point() else (self.pixel_mean.float(), self.pixel_std.float())

    def add_size(self, img_size: tuple[int, int]) -> None:
        """Let ``encode_visible`` and training take images of another size too, a multiple of the patch size.

        Their patches' positions are those of the same places in an image of the config's size. No parameter is added.
        """
        p = self.config.patch_size
        if min(img_size) < 1 or img_size[0] % p or img_size[1] % p:
            raise ValueError(f"image size {tuple(img_size)} must be a multiple of the patch size {p}")
        if img_size in self.sizes:
            return
        self.sizes = self.sizes | {img_size}
        grid = (img_size[0] // p, img_size[1] // p)
        for name in ("pos_embed", "decoder_pos_embed"):
            if (own := getattr(self, name, None)) is not None:
                table = sincos_positions(own.shape[-1], grid, self.config.grid).to(own)
                self.register_buffer(_table_name(name, img_size), table, persistent=False)

    def positions(self, name: str, img_size: tuple[int, int]) -> Tensor:
        """The table ``name`` (1, 1 + L, D), ``pos_embed`` or ``decoder_pos_embed``, for images of ``img_size``."""
        is_own = tuple(img_size) == self.config.img_size
        return getattr(self, name if is_own else _table_name(name, img_size))

    def check_size(self, images: Tensor, sizes: set[tuple[int, int]] | None = None) -> None:
        """Raise ValueError unless ``images`` is (B, C, H, W) of the config's size, or of one of ``sizes``."""
        sizes = sizes or {self.config.img_size}
        if images.ndim != 4 or images.shape[1] != self.config.in_chans or tuple(images.shape[2:]) not in sizes:
            allowed = " or ".join(f"(B, {self.config.in_chans}, {h}, {w})" for h, w in sorted(sizes))
            raise ValueError(f"images must be {allowed}, got {tuple(images.shape)}")


def _table_name(name: str, img_size: tuple[int, int]) -> str:
    return f"{name}_{img_size[0]}x{img_size[1]}"
