"""Masked autoencoder: the reference's model, call and parameter names, and a fast path with the same loss and gradients.

    loss = mean over masked patches of mean over pixels of (pred - target)**2

Source: He et al. 2021 (arXiv 2111.06377); parameter names and call are those of facebookresearch/mae.
"""

import torch
from torch import Tensor, nn

from fastmae.kernels import masked_mse, take_rows
from fastmae.kernels.masked_mse import EPS
from fastmae.model.config import ModelConfig, preset
from fastmae.model.decoder import DecoderMixin
from fastmae.model.encoder import Encoder
from fastmae.model.masking import Masking, random_masking


class MAE(DecoderMixin, Encoder):
    """A masked autoencoder.

    ``model(images, mask_ratio)`` is the reference's call; ``model.training_loss(images, masking)`` the fast path;
    ``model.encode(images)`` the features of all patches. Letters: B images, L patches each, K visible, Q predicted,
    P = p p C pixel values of a patch, channel fastest wherever patches of pixels are passed around.
    """

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.add_decoder(config)
        self.initialize_weights()

    def training_loss(self, images: Tensor, masking: Masking) -> Tensor:
        """The loss, a float32 scalar, by the exact shortcuts: only visible patches embedded, no unshuffle, last decoder
        block, norm and head on predicted patches only, target never stored.

        ``images`` (B, C, H, W): uint8, or floating point normalised already. The loss and its gradients equal those of
        ``forward`` under the same masking up to rounding. Images may have any size that the patch size divides
        (``add_size``). Raises ValueError on other sizes, and on a masking of another number of images or patches.
        """
        self.check_masking(images, masking)
        pred = self.predict(self.encode_visible(images, masking.ids_keep), masking, tuple(images.shape[2:]))
        config = self.config
        return masked_mse(
            pred, images, masking.ids_predict, config.patch_size, config.norm_pix_loss, *self.pixel_statistics(images)
        )

    def check_masking(self, images: Tensor, masking: Masking) -> None:
        """Raise ValueError unless ``masking`` has the number of images, and of patches in each, of ``images`` (B, C, H, W)."""
        self.check_size(images)
        B, _, H, W = images.shape
        p = self.config.patch_size
        rows, columns = H // p, W // p
        if tuple(masking.ids_restore.shape) != (B, rows * columns) or masking.ids_keep.shape[0] != B:
            raise ValueError(
                f"masking must have {B} images of {rows} x {columns} = {rows * columns} patches for images of {H} x {W}, "
                f"got {masking.ids_restore.shape[0]} images of {masking.ids_restore.shape[1]} patches"
            )

    def forward(self, images: Tensor, mask_ratio: float = 0.75, noise: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """The reference's call: loss, pred (B, L, P) of all patches, mask (B, L) float, 0 kept and 1 removed.

        ``images`` (B, C, H, W): floating point normalised already, or uint8. ``noise`` (B, L) fixes the mask, smallest
        kept; None draws a new one. Raises InputError on a ratio that keeps nothing or everything.
        """
        images = self.normalize(images)
        latent, mask, ids_restore = self.forward_encoder(images, mask_ratio, noise)
        pred = self.forward_decoder(latent, ids_restore)
        return self.forward_loss(images, pred, mask), pred, mask

    def forward_encoder(self, images: Tensor, mask_ratio: float, noise: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Embed all patches, then mask: latent (B, 1 + K, D), mask (B, L), ids_restore (B, L). Raises ValueError on images of
        another size than the config's."""
        self.check_size(images, self.config.img_size)
        x = self.patch_embed(images) + self.pos_embed[:, 1:]
        x, mask, ids_restore = self.random_masking(x, mask_ratio, noise)
        return self.transform(x), mask, ids_restore

    def random_masking(self, x: Tensor, mask_ratio: float, noise: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Keep a random part of the tokens ``x`` (B, L, D): kept (B, K, D), mask (B, L), ids_restore (B, L) int64."""
        B, L, _ = x.shape
        ids_keep, _, ids_restore = random_masking(B, L, mask_ratio, noise=noise, device=x.device)
        mask = (ids_restore >= ids_keep.shape[1]).to(x.dtype)
        return take_rows(x, ids_keep, ids_restore), mask, ids_restore.long()

    def forward_loss(self, images: Tensor, pred: Tensor, mask: Tensor) -> Tensor:
        """Mean over removed patches of the squared error of ``pred`` (B, L, P) against normalised ``images``."""
        target = self.patchify(images)
        if self.config.norm_pix_loss:
            variance, mean = torch.var_mean(target, dim=-1, keepdim=True)
            target = (target - mean) / (variance + EPS) ** 0.5
        return ((pred - target).square().mean(-1) * mask).sum() / mask.sum()

    def patchify(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, L, P): patches row-major, channel fastest inside one."""
        B, C, _, _ = images.shape
        (rows, columns), p = self.config.grid, self.config.patch_size
        return images.reshape(B, C, rows, p, columns, p).permute(0, 2, 4, 3, 5, 1).reshape(B, rows * columns, p * p * C)

    def unpatchify(self, patches: Tensor) -> Tensor:
        """(B, L, P) -> (B, C, H, W), the inverse of ``patchify``."""
        (rows, columns), p = self.config.grid, self.config.patch_size
        x = patches.reshape(patches.shape[0], rows, columns, p, p, self.config.in_chans)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(x.shape[0], self.config.in_chans, rows * p, columns * p)

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """The reference's initialisation. The patch embedding's bias keeps the convolution's own."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.view(self.config.embed_dim, -1))
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)


def mae_vit_tiny_patch16(**overrides) -> MAE:
    """12 blocks of width 192, decoder 4 x 256: 8.9 M trainable parameters. Overrides are ``ModelConfig`` fields."""
    return MAE(preset("tiny", **overrides))


def mae_vit_small_patch16(**overrides) -> MAE:
    """12 blocks of width 384, decoder 4 x 256. Overrides are ``ModelConfig`` fields."""
    return MAE(preset("small", **overrides))


def mae_vit_base_patch16(**overrides) -> MAE:
    """ViT-B/16, decoder 8 x 512: 111.7 M trainable parameters. Overrides are ``ModelConfig`` fields."""
    return MAE(preset("base", **overrides))


def mae_vit_large_patch16(**overrides) -> MAE:
    """ViT-L/16, decoder 8 x 512: 329.2 M trainable parameters. Overrides are ``ModelConfig`` fields."""
    return MAE(preset("large", **overrides))


def mae_vit_huge_patch14(**overrides) -> MAE:
    """ViT-H/14, decoder 8 x 512: 656.6 M trainable parameters. Overrides are ``ModelConfig`` fields."""
    return MAE(preset("huge", **overrides))
