"""lightly's masked autoencoder, of its parts for timm's transformer: the prediction head sees masked patches alone."""

import torch.nn.functional as F
from torch import Tensor, nn

from fastmae.benchmarks.peers.eager import NORM, eager, load
from fastmae.benchmarks.training.contenders import MASK_RATIO, Contender, Workload
from fastmae.benchmarks.training.reference import Draw, declare_torchvision_operators
from fastmae.model.config import kept_patches


def lightly_mae(workload: Workload) -> Contender:
    """Its parts for timm's transformer, joined."""
    declare_torchvision_operators()
    import lightly
    from lightly.models import utils
    from lightly.models.modules import MaskedVisionTransformerDecoderTIMM, MaskedVisionTransformerTIMM
    from timm.models.vision_transformer import VisionTransformer

    c, draw = workload.config, Draw()
    vit = VisionTransformer(
        img_size=c.img_size[0], patch_size=c.patch_size, in_chans=c.in_chans, num_classes=0, embed_dim=c.embed_dim,
        depth=c.depth, num_heads=c.num_heads, mlp_ratio=c.mlp_ratio, norm_layer=NORM,
    )  # fmt: skip
    decoder = MaskedVisionTransformerDecoderTIMM(
        num_patches=c.patches, embed_dim=c.decoder_embed_dim, depth=c.decoder_depth, num_heads=c.decoder_num_heads,
        mlp_ratio=c.mlp_ratio, norm_layer=NORM,
    )  # fmt: skip
    embed, head = nn.Linear(c.embed_dim, c.decoder_embed_dim), nn.Linear(c.decoder_embed_dim, c.patch_values)
    backbone = MaskedVisionTransformerTIMM(vit=vit)
    parts = nn.ModuleDict({"backbone": backbone, "decoder_embed": embed, "decoder": decoder, "decoder_pred": head})
    weights = {_lightly_name(name): value for name, value in workload.weights().items()}
    load(parts, {**weights, "backbone.mask_token": backbone.mask_token}, f"lightly {lightly.__version__}")
    K = kept_patches(c.patches, MASK_RATIO)

    def loss(images: Tensor) -> Tensor:
        ids = 1 + draw(len(images), c.patches, device=images.device).argsort(1)  # token 0 is the class token
        ids_keep, ids_mask = F.pad(ids[:, :K], (1, 0)), ids[:, K:]
        x = embed(backbone.encode(images, idx_keep=ids_keep))  # (B, 1 + K, E)
        tokens = utils.set_at_index(x.new_zeros(len(x), 1 + c.patches, x.shape[2]), ids_keep, x)
        pred = head(utils.get_at_index(decoder(tokens, idx_mask=ids_mask), ids_mask))
        target = utils.get_at_index(utils.patchify(images, c.patch_size), ids_mask - 1)
        return F.mse_loss(pred, utils.normalize_mean_var(target) if c.norm_pix_loss else target)

    description = (
        f"lightly {lightly.__version__}, MaskedVisionTransformerTIMM and its decoder as in its examples, with targets "
        "normalised, which they leave out; the reference's work, but the head predicts masked patches alone, and mask tokens "
        "are blended into the full sequence by multiplication"
    )
    return eager(workload, parts, loss, draw, description, fused=False)


def _lightly_name(name: str) -> str:
    """A name of the reference by those of ``parts`` above."""
    if name == "mask_token":
        return "decoder.mask_token"
    if name.startswith(("decoder_embed.", "decoder_pred.")):
        return name
    return f"decoder.{name.removeprefix('decoder_')}" if name.startswith("decoder_") else f"backbone.vit.{name}"
