"""CrossMAE (arXiv 2401.14391) of a user's own clone: the reference's encoder, and a decoder of cross-attention alone."""

import contextlib
import io
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastmae.benchmarks.peers.eager import NORM, eager, load
from fastmae.benchmarks.training.contenders import MASK_RATIO, Contender, Workload
from fastmae.benchmarks.training.reference import CROSSMAE, Draw, load_clone
from fastmae.benchmarks.training.twin import TwinMAE
from fastmae.errors import InputError


class _Encoded(nn.Module):
    """In the place of the twin's blocks: the output of another encoder, whatever the input."""

    def __init__(self, encode: Callable[[], Tensor]):
        super().__init__()
        self.encode = encode

    def forward(self, _: Tensor) -> Tensor:
        """(B, 1 + K, D)."""
        return self.encode()


def cross_mae(workload: Workload) -> Contender:
    """``MaskedAutoencoderViT`` of the clone, as its recipes call it. Raises InputError if its file is missing."""
    c, draw = workload.config, Draw()
    if c.in_chans != 3:
        raise InputError(f"contender crossmae takes images of 3 channels, got {c.in_chans}")
    module = load_clone(workload.crossmae, *CROSSMAE, draw)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints, where a table and JSON belong
        model = module.MaskedAutoencoderViT(
            img_size=c.img_size[0], patch_size=c.patch_size, embed_dim=c.embed_dim, depth=c.depth, num_heads=c.num_heads,
            decoder_embed_dim=c.decoder_embed_dim, decoder_depth=c.decoder_depth, decoder_num_heads=c.decoder_num_heads,
            mlp_ratio=c.mlp_ratio, norm_layer=NORM, norm_pix_loss=c.norm_pix_loss,
            weight_fm=True, use_input=True,
        )  # fmt: skip
    encoder = {n: v for n, v in workload.weights().items() if n.startswith(("cls_token", "pos_embed", "patch_embed", "blocks"))}
    own = {n: v for n, v in model.state_dict().items() if n.startswith(("mask_token", "decoder_", "wfm", "dec_norms"))}
    load(model, {**own, **encoder}, "this clone of CrossMAE")

    def compared(images: Tensor, seed: int) -> Tensor:
        images = workload.normalised(images)
        judge = TwinMAE(c, fused=True, rand=draw).to(workload.device)  # kept no longer: memory is measured too
        judge.load_state_dict(workload.weights())
        judge.blocks = _Encoded(lambda: model.forward_encoder(images, MASK_RATIO, MASK_RATIO)[0][-1])
        torch.manual_seed(seed)
        draw.noise = torch.rand(len(images), c.patches, device=images.device)  # for both
        return judge(images, MASK_RATIO)[0]

    def loss(images: Tensor) -> Tensor:
        return model(images, mask_ratio=MASK_RATIO, kept_mask_ratio=MASK_RATIO)

    description = (
        f"CrossMAE with {c.decoder_depth} decoder blocks, feature maps weighted, all masked patches predicted; the reference's "
        "encoder and targets, and then another, smaller model with a loss of its own: masked tokens attend to the encoder's "
        "maps and not to each other; compared is the float32 loss of the reference's decoder on its encoder's output; its code "
        "has the autocast to fp16, its loop a loss scaler and a wait at each step"
    )
    return eager(workload, model, loss, draw, description, fused=False, is_scaled=True, compared=compared)
