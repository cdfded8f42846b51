"""Which attention a run computes with, the same on all of its processes."""

import json

import torch

from fastmae.attention import attention_shapes, resolve
from fastmae.backends import why_not
from fastmae.choice import Shape, adopt
from fastmae.config import ModelConfig
from fastmae.errors import InputError
from fastmae.masking import kept_patches
from fastmae.train.parallel import World


def choose_attention(config: ModelConfig, mask_ratio: float, dtype: torch.dtype, world: World) -> str:
    """Fix what ``config.attention`` stands for on the run's shapes; return it for people, with the reason if xformers cannot.

    Timings differ from process to process, so the main one measures and the others take its word. Raises InputError if a
    backend asked for by name cannot run.
    """
    device, K = world.device.type, kept_patches(config.patches, mask_ratio)
    shapes = attention_shapes(config, K, config.patches - K)
    for shape in shapes if config.attention != "auto" else []:
        if reason := why_not(config.attention, device, dtype, shape.head_dim):
            raise InputError(
                f"attention {config.attention} does not work here, {reason}; leave it to auto, or see `fastmae doctor`"
            )
    word = [[*s, resolve(config.attention, device, dtype, s)] for s in shapes] if world.is_main else None
    chosen = {Shape(*sizes): backend for *sizes, backend in json.loads(world.from_main(json.dumps(word)))}
    if config.attention == "auto":
        adopt(device, dtype, chosen)
    text = " and ".join(dict.fromkeys(chosen.values()))
    reason = why_not("xformers", device, dtype, shapes[0].head_dim) if device == "cuda" else None
    return f"{text} (xformers does not work here: {reason})" if config.attention == "auto" and reason else text
