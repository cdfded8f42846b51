"""What the blocks of a run fuse: measured once by rank 0, or named; and again where the run is resumed."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from fastmae.errors import InputError
from fastmae.model.attention.backends import RETURN_BIAS, Shape
from fastmae.model.attention.dot_product import MEASURED
from fastmae.model.block.choice import BlockShape, adopt_fused, block_shapes, residual_of
from fastmae.model.block.measured import BlockTask, choose_block
from fastmae.model.block.probe import probe_blocks, why_not_fused
from fastmae.model.block.trial import TRIED, attention_of
from fastmae.model.config import FUSED, ModelConfig, kept_patches
from fastmae.train.checkpoint.format import Checkpoint
from fastmae.train.config.recipes import Recipe


@dataclass(frozen=True)
class SavedFused:
    """What auto chose to fuse in the run of a checkpoint."""

    where: str
    """Dtypes and device."""
    names: dict[str, list[str]]
    """Of each ``BlockShape``, written for people."""
    notes: list[str]
    """What of it is not known here."""

    @classmethod
    def of(cls, checkpoint: Checkpoint | None) -> "SavedFused | None":
        """None if there is no checkpoint, or auto did not choose."""
        if checkpoint is None or (model := ModelConfig.from_json(checkpoint.state["model"])).fused != "auto":
            return None
        saved = checkpoint.state["attention"]
        where = f"{saved.get('dtype')} on {saved.get('device')}, residual {model.residual}"
        found = saved.get("fused", {})
        found = found if isinstance(found, dict) else {}
        known = {s: names for s, names in found.items() if isinstance(names, list) and all(n in FUSED for n in names)}
        unknown = sorted({str(names) for shape, names in found.items() if shape not in known})
        lines = [f"fused operations {names} of the checkpoint are not known here: chosen again" for names in unknown]
        return cls(where, known, lines)


def run_block_shapes(recipe: Recipe) -> list[BlockShape]:
    """The block shapes of training, at all of its image sizes."""
    shapes = []
    for size in (recipe.model.img_size, *(size for _, size in recipe.progressive)):
        model = replace(recipe.model, img_size=size)
        K = kept_patches(model.patches, recipe.mask_ratio)
        shapes += block_shapes(model, K, model.patches - K)
    return list(dict.fromkeys(shapes))


def probe_fused(recipe: Recipe, device: str, dtype: torch.dtype, index: int | None = None) -> None:
    """Try what blocks may fuse, on the GPU of number ``index``, in another process: this one's GPU may stay closed."""
    wanted, attention = recipe.model.fused, recipe.model.attention
    own = [b for b in RETURN_BIAS if attention in ("auto", b)]
    names = {"auto": [n for n in TRIED if n not in RETURN_BIAS or n in own], "off": []}.get(wanted, [*wanted.split(","), *own])
    probe_blocks(device, dtype, residual_of(recipe.model, dtype), run_block_shapes(recipe), tuple(names), index)


def choose_fused(recipe: Recipe, device: str, dtype: torch.dtype, attention: Mapping[Shape, str], saved: SavedFused | None,
                 compiles: bool) -> tuple[dict[str, list[str]], list[str]]:  # fmt: skip
    """What blocks of each shape fuse from now on, by its name, and lines for people; nothing unless it is named or measured.

    ``attention``: the backend of each shape, or auto, which may then be chosen again as part of the block. Raises InputError if
    an operation asked for by name does not work.
    """
    residual, wanted, shapes = residual_of(recipe.model, dtype), recipe.model.fused, run_block_shapes(recipe)
    if wanted != "auto":
        return _take_named(() if wanted == "off" else tuple(wanted.split(",")), device, dtype, residual, shapes), []
    here, lines, before = f"{str(dtype).removeprefix('torch.')} on {device}, residual {recipe.model.residual}", [], {}
    if saved and saved.where != here and saved.names:
        lines.append(f"what blocks fuse is chosen again: {here}, and the checkpoint's was chosen for {saved.where}")
    elif saved and saved.where == here:
        lines, before = [*saved.notes], saved.names
    chosen, found, began = {}, [], time.monotonic()
    for shape in shapes:
        task = BlockTask(device, dtype, residual, shape, attention[attention_of(shape)], compiles)
        names, reason = before.get(str(shape)), None
        if names is not None:
            probe_blocks(device, dtype, residual, [shape], tuple(names))
            reason = next(filter(None, (why_not_fused(name, device, dtype, residual, shape) for name in names)), None)
        if names is None or reason:
            if device not in MEASURED:
                continue
            found.append(choose_block(task))
            names = list(found[-1].best.fused)
        if reason:
            lines.append(f"fused {', '.join(before[str(shape)])} of the checkpoint does not work here, {reason}; "
                         f"{', '.join(names) or 'nothing'} is used for {shape}")  # fmt: skip
        chosen[str(shape)] = names
    adopt_run(recipe, device, dtype, chosen)
    if any(each.microseconds for each in found):
        lines.append(f"blocks were measured for this device, in {time.monotonic() - began:.0f} s")
    for failure in dict.fromkeys(each.failure for each in found if each.failure):
        lines.append(f"blocks could not be measured, so that nothing is fused: {failure}")
    return chosen, lines


def adopt_run(recipe: Recipe, device: str, dtype: torch.dtype, chosen: Mapping[str, list[str]]) -> None:
    """Use what rank 0 chose, so that all ranks of a run compute identically."""
    known = {shape: tuple(chosen[str(shape)]) for shape in run_block_shapes(recipe) if str(shape) in chosen}
    adopt_fused(device, dtype, residual_of(recipe.model, dtype), known)


def _take_named(names: tuple[str, ...], device: str, dtype: torch.dtype, residual: torch.dtype,
                shapes: list[BlockShape]) -> dict[str, list[str]]:  # fmt: skip
    probe_blocks(device, dtype, residual, shapes, names)
    for shape in shapes:
        for name in names:
            if reason := why_not_fused(name, device, dtype, residual, shape):
                raise InputError(f"fused {name} does not work here for {shape}, {reason}; choose auto or off")
    return {str(shape): list(names) for shape in shapes}
