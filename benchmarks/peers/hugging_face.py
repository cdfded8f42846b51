"""Hugging Face's ViTMAE (``transformers``): the reference's work, in blocks with a product each for q, k and v."""

from torch import Tensor

from fastmae.benchmarks.peers.eager import EPS, eager, load
from fastmae.benchmarks.training.contenders import MASK_RATIO, Contender, Workload
from fastmae.benchmarks.training.reference import Draw, declare_torchvision_operators


def hugging_face(workload: Workload) -> Contender:
    """``ViTMAEForPreTraining``. Raises InputError if transformers names its parameters not as version 5 does."""
    declare_torchvision_operators()
    import transformers
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    c = workload.config
    config = ViTMAEConfig(
        hidden_size=c.embed_dim, num_hidden_layers=c.depth, num_attention_heads=c.num_heads,
        intermediate_size=int(c.mlp_ratio * c.embed_dim), layer_norm_eps=EPS, image_size=c.img_size[0],
        patch_size=c.patch_size, num_channels=c.in_chans, decoder_hidden_size=c.decoder_embed_dim,
        decoder_num_hidden_layers=c.decoder_depth, decoder_num_attention_heads=c.decoder_num_heads,
        decoder_intermediate_size=int(c.mlp_ratio * c.decoder_embed_dim), mask_ratio=MASK_RATIO, norm_pix_loss=c.norm_pix_loss,
    )  # fmt: skip
    model = ViTMAEForPreTraining(config)
    positions = (model.vit.embeddings.position_embeddings, model.decoder.decoder_pos_embed)
    zeros = [name for name, table in zip(("encoder", "decoder"), positions, strict=True) if not table.any()]
    load(model, hf_weights(workload.weights()), f"transformers {transformers.__version__}")
    draw = Draw()

    def loss(images: Tensor) -> Tensor:
        return model(images, noise=draw(len(images), c.patches, device=images.device)).loss

    description = (
        f"transformers {transformers.__version__}, ViTMAEForPreTraining, the reference's work; q, k and v of a block are three "
        f"products instead of one; LayerNorm's eps is set to the reference's {EPS:g} (its default is 1e-12)"
    )
    if zeros:
        description += f"; made from a config, its frozen positions of {' and '.join(zeros)} are zeros: here they are ours"
    return eager(workload, model, loss, draw, description, fused=True)


def hf_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """``weights`` of the reference's names by those of transformers 5."""
    renamed = {
        "cls_token": "vit.embeddings.cls_token",
        "pos_embed": "vit.embeddings.position_embeddings",
        "patch_embed.proj": "vit.embeddings.patch_embeddings.projection",
        "blocks": "vit.layers",
        "norm": "vit.layernorm",
        "decoder_blocks": "decoder.decoder_layers",
    }
    parts = {"norm1": "layernorm_before", "norm2": "layernorm_after", "attn.proj": "attention.o_proj"}
    found = {}
    for name, value in weights.items():
        for ours, theirs in renamed.items():
            if f"{name}.".startswith(f"{ours}."):
                name = theirs + name.removeprefix(ours)
                break
        else:
            name = f"decoder.{name}"
        for ours, theirs in parts.items():
            name = name.replace(f".{ours}.", f".{theirs}.")
        if ".attn.qkv." in name:
            found |= {name.replace("attn.qkv", f"attention.{which}_proj"): part
                      for which, part in zip("qkv", value.chunk(3), strict=True)}  # fmt: skip
        else:
            found[name] = value
    return found
