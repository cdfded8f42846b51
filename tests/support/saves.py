"""Checkpoints of a state so small that one is written in milliseconds: shared by tests of saving, and of what was saved."""

import random
from pathlib import Path

import torch
from torch import Tensor

from fastmae import MAE, ModelConfig
from fastmae.train.checkpoint.format import SCHEMA, find_checkpoint
from fastmae.train.checkpoint.saver import Saver
from fastmae.train.checkpoint.state import random_state
from fastmae.train.distributed.world import World

CONFIG = ModelConfig(img_size=8, patch_size=4, embed_dim=8, depth=1, num_heads=2, norm_pix_loss=True,
                     decoder_embed_dim=8, decoder_depth=1, decoder_num_heads=2)  # fmt: skip
WORLD = World(0, 1, torch.device("cpu"))


def saver_of(out: Path, world: World = WORLD, **options) -> Saver:
    """A saver of one process, which waits for its saves unless told otherwise."""
    return Saver(out, CONFIG, world, **{"keep": 3, "keep_every": None, "asynchronous": False, **options})


def tensors_at(step: int) -> dict[str, Tensor]:
    """A state of which every element is ``step``."""
    model = {f"model/{name}": torch.full_like(t, step) for name, t in MAE(CONFIG).state_dict().items()}
    return {**model, "optimizer/step/norm.weight": torch.tensor(float(step))}


def state_at(step: int) -> dict:
    """What ``state.json`` says of it."""
    return {"schema": SCHEMA, "step": step, "data": {"samples": step}, "model": CONFIG.to_json(),
            "recipe": {"seed": 0, "effective_batch": 1}, "attention": {}}  # fmt: skip


def save(saver: Saver, step: int, tensors: dict[str, Tensor] | None = None) -> Path:
    """Begin the checkpoint of ``step``; return its folder."""
    saver.begin(step, tensors or tensors_at(step), random_state(WORLD), state_at(step))
    return saver.out / f"step-{step:07d}"


def found_in(run: Path) -> tuple[Path | None, list[str]]:
    """Folder of the newest complete checkpoint of ``run``, and the lines about damaged ones."""
    found, lines = find_checkpoint(run)
    return found and found.folder, lines


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file under ``folder``."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def damages(data: bytes, seed: int) -> dict[str, bytes]:
    """``data`` with one bit flipped at each of 50 places, and cut at each of 10."""
    draw = random.Random(seed)
    found = {}
    for _ in range(50):
        at = draw.randrange(len(data))
        found[f"flipped at {at}"] = data[:at] + bytes([data[at] ^ 1 << draw.randrange(8)]) + data[at + 1 :]
    return found | {f"cut at {at}": data[:at] for at in (0, len(data) - 1, *draw.choices(range(len(data)), k=8))}
