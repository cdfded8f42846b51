"""Pictures of what a model reconstructs while it trains."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from fastmae import MAE
from fastmae.model.attention import choice
from fastmae.model.attention import dot_product as attention
from fastmae.model.pictures import strip
from fastmae.train.distributed.world import World
from fastmae.train.pretrain.attention_choice import choose_attention
from fastmae.train.pretrain.previews import Drawing
from tests.support.batches import damage_samples
from tests.support.crew import run
from tests.support.runs import MODEL, RECIPE

ALONE = World(0, 1, torch.device("cpu"))
HEADER = strip(torch.zeros(1, 4, 3, 32, 32)).height - 260  # pixels: the caption and the columns' names


class Album:
    """A log that keeps its pictures."""

    def __init__(self):
        self.pictures = []

    def picture(self, step, strip):
        self.pictures.append((step, strip.copy()))


def test_the_same_images_are_drawn_with_the_same_masks_and_nothing_else_changes(shard_folder):
    model, album = MAE(MODEL), Album()
    drawing = Drawing(str(shard_folder), model, ALONE, 0.75)
    before, state = torch.get_rng_state(), {n: t.clone() for n, t in model.state_dict().items()}
    for step in (1, 2):
        drawing.draw(step, album)
    (one, first), (two, second) = album.pictures
    assert (one, two) == (1, 2) and first.tobytes() == second.tobytes() and first.size == (1044, HEADER + 8 * 260)
    assert torch.equal(before, torch.get_rng_state()) and model.training
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("depth", [1, 2])  # a decoder of one block never trains with all queries over all keys
def test_a_drawing_measures_no_backend_and_computes_with_the_runs_dtype_and_backend(depth, autocast, shard_folder, monkeypatch):
    recipe = replace(RECIPE, model=replace(MODEL, decoder_depth=depth))
    used, genuine = [], attention.attend
    monkeypatch.setattr(attention, "MEASURED", ("cpu",))
    monkeypatch.setattr(choice, "_chosen", {})
    monkeypatch.setattr(choice, "measure", lambda *_: {"math": 1.0})
    choose_attention(recipe, autocast or torch.float32, ALONE)
    monkeypatch.setattr(choice, "measure", lambda *place: pytest.fail(f"measured {place}"))

    def attend(packed, q, backend, bias):
        used.append(((packed[:, :, 0] if q is None else q).shape[1], packed.shape[1], packed.dtype, backend))
        return genuine(packed, q, backend, bias)

    monkeypatch.setattr(attention, "attend", attend)
    album = Album()
    Drawing(str(shard_folder), MAE(recipe.model), ALONE, 0.75, autocast).draw(1, album)
    dtype = autocast or torch.float32
    assert set(used) == {(5, 5, dtype, "math"), (17, 17, dtype, "sdpa" if depth == 1 else "math")} and len(album.pictures) == 1


@pytest.mark.parametrize("why", ["a stream", "damage"])
def test_if_the_first_images_cannot_be_read_those_of_a_batch_are_drawn(shard_folder, tmp_path, why):
    data = tmp_path / "copy"
    shutil.copytree(shard_folder, data)
    if why == "damage":
        damage_samples(data, 37)
    else:
        (data / "index.json").unlink()
    album, drawing = Album(), Drawing(str(data), MAE(MODEL), ALONE, 0.75)
    drawing.draw(1, album)
    drawing.offer(torch.zeros(4, 3, 16, 16, dtype=torch.uint8))  # of another size, as progressive runs begin with
    drawing.draw(2, album)
    assert album.pictures == []
    drawing.offer(torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8))
    drawing.draw(3, album)
    assert [(step, picture.height) for step, picture in album.pictures] == [(3, HEADER + 4 * 260)]


@pytest.mark.cluster
def test_a_sharded_model_is_drawn_as_a_full_one(shard_folder, tmp_path):
    drawn = []
    for how in ("ddp", "fsdp"):
        run(2, shard_folder, tmp_path / how, "--steps", 2, "--draw-every", 1, "--parallel", how)
        with Image.open(tmp_path / how / "reconstructions" / "step-0000002.png") as picture:
            drawn.append(np.asarray(picture).astype(int))
    assert np.abs(drawn[0] - drawn[1]).max() <= 2  # grey levels; sums are rounded in another order
