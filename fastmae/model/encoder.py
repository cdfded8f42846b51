"""The encoder: a vision transformer over all patches of an image, or the visible ones alone.

    tokens = [cls, W pixels(patch) + b + pos(patch), ...];    features = norm(blocks(tokens))

Source: He et al. 2021 (arXiv 2111.06377), section 3 "MAE encoder"; parameter names are those of timm's ViT.
"""

import torch
from torch import Tensor, nn

from fastmae.kernels import gather_patches
from fastmae.model.block.block import LAYER_NORM_EPS, Block, run_blocks
from fastmae.model.block.linear import compute_dtype, linear, residual_dtype
from fastmae.model.config import ModelConfig
from fastmae.model.positions import resized, sincos_positions


class PatchEmbed(nn.Module):
    """Patches to tokens: a convolution whose stride is its size. Weight (D, C, p, p)."""

    def __init__(self, in_chans: int, patch_size: int, dim: int):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        """Every patch: (B, C, H, W) -> (B, L, D). By a linear layer, so that it rounds like the fast path: on GPUs torch's
        float32 convolutions use TF32 by default and its linear layers do not."""
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
        # A parameter, not a buffer, because it is one in the reference; loaded tables are kept.
        self.pos_embed = nn.Parameter(sincos_positions(D, config.grid), requires_grad=False)
        self.patch_embed = PatchEmbed(config.in_chans, config.patch_size, D)
        self.blocks = nn.ModuleList(
            Block(D, config.num_heads, config.mlp_ratio, config.attention, config.fused) for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(D, eps=LAYER_NORM_EPS)
        self.register_buffer("pixel_mean", torch.tensor(config.pixel_mean), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(config.pixel_std), persistent=False)
        self.register_load_state_dict_post_hook(Encoder._renew_tables)

    def encode(self, images: Tensor) -> Tensor:
        """Features of all patches, no mask: (B, 1 + L, D), class token first. ``images`` as in ``normalize``, of any size
        that the patch size divides. Positions of other sizes than the config's: ``add_size``."""
        images = self.normalize(images)
        return self.transform(self.patch_embed(images) + self.positions("pos_embed", tuple(images.shape[2:]))[:, 1:])

    def encode_visible(self, images: Tensor, ids_keep: Tensor) -> Tensor:
        """Features of the patches ``ids_keep`` (B, K) int32 alone: (B, 1 + K, D). Other patches are never read.

        ``images`` as in ``encode``.
        """
        self.check_size(images)
        dtype = compute_dtype(self.cls_token)
        pixels = gather_patches(images, ids_keep, self.config.patch_size, *self.pixel_statistics(images), dtype=dtype)
        positions = self.positions("pos_embed", tuple(images.shape[2:]))
        return self.transform(self.patch_embed.embed_pixels(pixels) + positions[0, 1:][ids_keep], dtype)

    def transform(self, tokens: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Class token, blocks and final norm on embedded tokens: (B, N, D) -> (B, 1 + N, D) in ``dtype``, by default the
        norm's."""
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(tokens.shape[0], -1, -1)
        x = torch.cat([cls, tokens], dim=1)
        x = x.to(residual_dtype(x, self.config.residual))
        return run_blocks(self.blocks, x, self.norm, checkpointing=self.config.checkpointing, dtype=dtype)

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 images (B, C, H, W) as floats less the config's mean over its std; floating-point ones as they are.

        Raises ValueError unless they have the config's channels and a size that the patch size divides.
        """
        self.check_size(images)
        if images.is_floating_point():
            return images
        mean, std = self.pixel_statistics(images)
        return (images / 255 - mean[:, None, None]) / std[:, None, None]

    def pixel_statistics(self, images: Tensor) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """Mean and std to be applied to ``images`` by a kernel: the config's for uint8, none for normalised floats."""
        return (None, None) if images.is_floating_point() else (self.pixel_mean.float(), self.pixel_std.float())

    @torch.inference_mode(False)
    @torch.no_grad()
    def add_size(self, img_size: tuple[int, int]) -> None:
        """Make the position tables for images of another size (height, width), a multiple of the patch size.

        A patch gets the position of the same relative position in an image of the config's size: computed if the table is the
        sin-cos one, else (trained positions) interpolated bicubically; the class token's row is kept. No parameter is added.
        ``encode`` and ``training_loss`` call this for a new size, except under torch.compile, which needs it before. Raises
        ValueError on other sizes.
        """
        p = self.config.patch_size
        if min(img_size) < 1 or img_size[0] % p or img_size[1] % p:
            raise ValueError(f"image size {tuple(img_size)} must be a multiple of the patch size {p}")
        grid = (img_size[0] // p, img_size[1] // p)
        for name in ("pos_embed", "decoder_pos_embed"):
            if (own := getattr(self, name, None)) is not None and tuple(img_size) != self.config.img_size:
                self.register_buffer(_table_name(name, img_size), resized(own, self.config.grid, grid), persistent=False)

    def positions(self, name: str, img_size: tuple[int, int]) -> Tensor:
        """The table ``name`` (1, 1 + L, D), ``pos_embed`` or ``decoder_pos_embed``, for images of ``img_size``."""
        if img_size == self.config.img_size:
            return getattr(self, name)
        if not hasattr(self, _table_name(name, img_size)):
            if torch.compiler.is_compiling():
                raise ValueError(f"no positions for images of size {img_size}: call add_size({img_size}) before torch.compile")
            self.add_size(img_size)
        return getattr(self, _table_name(name, img_size))

    def check_size(self, images: Tensor, img_size: tuple[int, int] | None = None) -> None:
        """Raise ValueError unless ``images`` is (B, C, H, W) with the config's channels, of ``img_size`` if given, or else of
        any size that the patch size divides."""
        p, C = self.config.patch_size, self.config.in_chans
        if images.ndim != 4 or images.shape[1] != C or tuple(images.shape[2:]) != (img_size or tuple(images.shape[2:])):
            size = "H, W" if img_size is None else f"{img_size[0]}, {img_size[1]}"
            raise ValueError(f"images must be (B, {C}, {size}), got {tuple(images.shape)}")
        if images.shape[2] < 1 or images.shape[3] < 1 or images.shape[2] % p or images.shape[3] % p:
            raise ValueError(f"images must be multiples of the patch size {p} high and wide, got {tuple(images.shape[2:])}")

    def _renew_tables(self, _keys: object) -> None:
        """After weights are loaded, make the tables of other sizes again."""
        prefix = "pos_embed_"
        for name in [name for name in self._buffers if name.startswith(prefix)]:
            height, _, width = name.removeprefix(prefix).partition("x")
            self.add_size((int(height), int(width)))


def _table_name(name: str, img_size: tuple[int, int]) -> str:
    return f"{name}_{img_size[0]}x{img_size[1]}"
