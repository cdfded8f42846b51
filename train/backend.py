"""Which attention a run computes with, the same on all of its processes."""

import json
from dataclasses import replace

import torch

from fastmae.attention import attention_shapes, resolve
from fastmae.backends import why_not
from fastmae.choice import Shape, adopt
from fastmae.config import ModelConfig, kept_patches
from fastmae.errors import InputError
from fastmae.train.world import World


def choose_attention(config: ModelConfig, sizes: list[tuple[int, int]], mask_ratio: float, dtype: torch.dtype,
                     world: World) -> str:  # fmt: skip
    """Fix what ``config.attention`` stands for on the run's shapes; return it for people, with the reason if xformers cannot.

    ``sizes``: other (height, width) of images that the run will meet.

    Timings differ from process to process, so the main one measures and the others take its word. Raises InputError if a
    backend asked for by name cannot run.
    """
    device, shapes = world.device.type, []
    for model in (config, *(replace(config, img_size=size) for size in sizes)):
        K = kept_patches(model.patches, mask_ratio)
        shapes += attention_shapes(model, K, model.patches - K)
    shapes = list(dict.fromkeys(shapes))
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
