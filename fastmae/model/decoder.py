"""The decoder: from the visible patches' features to the pixels of the masked ones.

    tokens = [embed(latent) + pos(visible), mask_token + pos(masked)];    pred = head(norm(blocks(tokens)))

The order of tokens makes no difference to its blocks, so they stay shuffled: no unshuffle. Only masked rows are predicted, so
in the last block queries, projection and MLP, and then norm and head, run on those rows alone.
Source: He et al. 2021 (arXiv 2111.06377), section 3 "MAE decoder".
"""

import torch
from torch import Tensor, nn

from fastmae.kernels import decoder_input, take_rows
from fastmae.model.block.block import LAYER_NORM_EPS, Block, run_blocks
from fastmae.model.block.linear import Linear, compute_dtype, residual_dtype
from fastmae.model.config import ModelConfig
from fastmae.model.masking import Masking
from fastmae.model.positions import sincos_positions


class DecoderMixin:
    """The decoder's parameters and passes, mixed into the encoder so that names are as flat as the reference's."""

    def add_decoder(self, config: ModelConfig) -> None:
        """Register the decoder's parameters on this module."""
        D = config.decoder_embed_dim
        self.mask_token = nn.Parameter(torch.zeros(1, 1, D))
        self.decoder_pos_embed = nn.Parameter(sincos_positions(D, config.grid), requires_grad=False)
        self.decoder_embed = Linear(config.embed_dim, D)
        self.decoder_blocks = nn.ModuleList(
            Block(D, config.decoder_num_heads, config.mlp_ratio, config.attention, config.fused)
            for _ in range(config.decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(D, eps=LAYER_NORM_EPS)
        self.decoder_pred = Linear(D, config.patch_values)

    def predict(self, latent: Tensor, masking: Masking, img_size: tuple[int, int] | None = None) -> Tensor:
        """Pixels of the patches ``masking.ids_predict``: latent (B, 1 + K, D) -> (B, Q, P), channel fastest.

        ``img_size``: of the images, by default the config's; see ``add_size``.
        """
        first = latent.shape[1]
        config = self.config
        # (B, 1 + K + Q, D)
        x = decoder_input(
            self.decoder_embed(latent), self.mask_token.view(-1),
            self.positions("decoder_pos_embed", img_size or config.img_size)[0], masking.ids_keep, masking.ids_predict,
            residual_dtype(self.mask_token, config.residual),
        )  # fmt: skip
        x = run_blocks(self.decoder_blocks, x, self.decoder_norm, first=first, checkpointing=config.checkpointing,
                       dtype=compute_dtype(x))  # (B, Q, D)  # fmt: skip
        return self.decoder_pred(x)

    def forward_decoder(self, latent: Tensor, ids_restore: Tensor) -> Tensor:
        """The reference's pass, pixels of all patches in spatial order: latent (B, 1 + K, D) -> (B, L, P)."""
        K = latent.shape[1] - 1
        ids_restore = ids_restore.to(torch.int32)
        ids_keep = torch.argsort(ids_restore, dim=1)[:, :K].to(torch.int32)
        x = self.decoder_embed(latent)
        patches = take_rows(x[:, 1:], ids_restore, ids_keep, self.mask_token.view(-1))  # unshuffle, (B, L, D)
        x = torch.cat([x[:, :1], patches], dim=1) + self.decoder_pos_embed
        x = x.to(residual_dtype(x, self.config.residual))
        x = run_blocks(
            self.decoder_blocks, x, self.decoder_norm, checkpointing=self.config.checkpointing, dtype=compute_dtype(x)
        )
        return self.decoder_pred(x)[:, 1:]
