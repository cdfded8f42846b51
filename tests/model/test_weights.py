"""Weights to and from files: strict names both ways, no code ever run from a file."""

import argparse
import builtins
import os
import pickle
import resource
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import strategies as st

import fastmae
from fastmae import MAE, DataError, InputError, ModelConfig
from fastmae.model.config import PRESETS, preset
from fastmae.model.weights import (
    Weights,
    infer_config,
    load_model,
    load_strictly,
    read_weights,
    save_model,
    save_pth,
    save_weights,
)
from tests.support.fuzz import MUTATION, every_draw, fuzz, mutate
from tests.support.hostile import Bomb

# A width of the presets, so that heads are known; everything else small.
CONFIG = ModelConfig(img_size=32, patch_size=8, embed_dim=192, depth=1, num_heads=3, norm_pix_loss=True,
                     decoder_embed_dim=64, decoder_depth=2, decoder_num_heads=2)  # fmt: skip


def test_safetensors_come_back_bit_for_bit_with_their_config(tmp_path):
    model = MAE(ModelConfig(img_size=(16, 32), patch_size=4, in_chans=4, embed_dim=24, depth=1, num_heads=2,
                            decoder_embed_dim=8, decoder_depth=1, decoder_num_heads=2, norm_pix_loss=True))  # fmt: skip
    save_model(model, tmp_path / "m.safetensors")
    back = load_model(tmp_path / "m.safetensors")
    assert back.config == model.config
    assert all(torch.equal(t, back.state_dict()[n]) for n, t in model.state_dict().items())


def test_written_files_are_readable_by_other_users(tmp_path):
    (tmp_path / "plain").touch()
    save_model(MAE(CONFIG), tmp_path / "m.safetensors")
    assert (tmp_path / "m.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("name", ["m.safetensors", "m.pth"])
def test_a_failed_write_is_an_oserror_and_keeps_the_previous_file(name, tmp_path):
    save_weights(Weights(tmp_path, {"a": torch.ones(3)}, None, False), tmp_path / name)
    before, (soft, hard) = (tmp_path / name).read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            save_weights(Weights(tmp_path, {"a": torch.ones(3000)}, None, False), tmp_path / name)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / name).read_bytes() == before and [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("norm_pix", [True, False])
def test_the_references_files_are_read_with_their_target(norm_pix, tmp_path):
    model = MAE(CONFIG)
    torch.save({"model": model.state_dict(), "args": argparse.Namespace(norm_pix_loss=norm_pix)}, tmp_path / "m.pth")
    back = load_model(tmp_path / "m.pth")
    assert back.config.norm_pix_loss == norm_pix and back.config.num_heads == 3
    assert all(torch.equal(t, back.state_dict()[n]) for n, t in model.state_dict().items())


def test_a_published_file_needs_its_target(tmp_path):
    torch.save({"model": MAE(CONFIG).state_dict()}, tmp_path / "m.pth")
    with pytest.raises(InputError, match="does not state its norm_pix_loss; add --norm-pix-loss"):
        load_model(tmp_path / "m.pth")
    assert load_model(tmp_path / "m.pth", norm_pix_loss=True).config == CONFIG


def test_the_reference_can_load_what_is_written_for_it(tmp_path):
    model = MAE(CONFIG)
    save_pth(Weights(tmp_path, model.state_dict(), CONFIG, True), tmp_path / "m.pth")
    with torch.serialization.safe_globals([argparse.Namespace]):
        document = torch.load(tmp_path / "m.pth", weights_only=True)
    MAE(CONFIG).load_state_dict(document["model"], strict=True)
    assert document["args"].norm_pix_loss is True


def test_a_pth_keeps_the_full_config(tmp_path):
    """Shapes do not show heads: 192 channels are three heads in the presets and four here."""
    config = replace(CONFIG, num_heads=4, img_size=(16, 32), pixel_mean=(0.1, 0.2, 0.3))
    model = MAE(config)
    save_model(model, tmp_path / "m.safetensors")
    save_weights(read_weights(tmp_path / "m.safetensors"), tmp_path / "m.pth")
    save_weights(read_weights(tmp_path / "m.pth"), tmp_path / "n.safetensors")
    assert load_model(tmp_path / "n.safetensors").config == config
    images = torch.randn(1, 3, 16, 32)
    assert torch.equal(load_model(tmp_path / "m.pth").encode(images), model.encode(images))


def test_heads_are_given_where_shapes_do_not_show_them(tmp_path):
    config = replace(CONFIG, embed_dim=40, num_heads=5, decoder_embed_dim=24, decoder_num_heads=3)
    model = MAE(config)
    torch.save({"model": model.state_dict()}, tmp_path / "m.pth")
    with pytest.raises(InputError, match=r"m\.pth: unknown architecture, .* pass heads, decoder_heads to"):
        fastmae.load_model(tmp_path / "m.pth", norm_pix_loss=True)
    back = fastmae.load_model(tmp_path / "m.pth", 5, 3, True)
    assert back.config == config
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(back.encode(images), model.encode(images))
    torch.save({"model": model.state_dict(), "args": argparse.Namespace(norm_pix_loss=True)}, tmp_path / "stated.pth")
    assert fastmae.load_model(tmp_path / "stated.pth", 5, 3).config == config
    for heads, decoder_heads in ((3, 3), (5, 5), (0, 3)):
        with pytest.raises(InputError, match=r"m\.pth: .*num_heads"):
            fastmae.load_model(tmp_path / "m.pth", heads=heads, decoder_heads=decoder_heads, norm_pix_loss=True)


def test_heads_override_a_guess_and_never_what_a_file_states(tmp_path):
    model = MAE(replace(CONFIG, num_heads=4))
    torch.save({"model": model.state_dict()}, tmp_path / "m.pth")
    assert fastmae.load_model(tmp_path / "m.pth", norm_pix_loss=True).config.num_heads == 3
    assert fastmae.load_model(tmp_path / "m.pth", heads=4, norm_pix_loss=True).config == model.config
    for name in ("n.safetensors", "n.pth"):
        save_weights(Weights(tmp_path, model.state_dict(), model.config, True), tmp_path / name)
        assert fastmae.load_model(tmp_path / name, heads=4).config == model.config
        with pytest.raises(InputError, match=r"states num_heads 4, got 3"):
            fastmae.load_model(tmp_path / name, heads=3)
        with pytest.raises(InputError, match=r"states decoder_num_heads 2, got 1"):
            fastmae.load_model(tmp_path / name, decoder_heads=1)


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match="is a folder; give a"):
        fastmae.load_model(tmp_path)


def test_the_attention_backend_of_the_training_machine_is_not_kept(tmp_path):
    save_model(MAE(replace(CONFIG, attention="xformers")), tmp_path / "m.safetensors")
    assert load_model(tmp_path / "m.safetensors").config == CONFIG


def test_an_encoder_only_file_is_refused_with_the_reason(tmp_path):
    state = {n: t for n, t in MAE(CONFIG).state_dict().items() if not n.startswith("decoder_") and n != "mask_token"}
    torch.save({"model": state}, tmp_path / "m.pth")
    with pytest.raises(InputError, match="holds an encoder only, and pixels need the decoder too"):
        load_model(tmp_path / "m.pth")


@pytest.mark.parametrize("name", PRESETS)
def test_presets_follow_from_their_shapes(name):
    config = preset(name, norm_pix_loss=True)
    with torch.device("meta"):
        assert infer_config(MAE(config).state_dict(), norm_pix_loss=True) == config


def test_code_in_a_file_is_never_run(tmp_path):
    mark = tmp_path / "mark"
    (tmp_path / "m.pth").write_bytes(pickle.dumps({"model": Bomb(mark)}, protocol=2))
    torch.save({"model": Bomb(mark)}, tmp_path / "n.pth")
    for name in ("m.pth", "n.pth"):
        with pytest.raises(DataError, match="nothing in it was run"):
            read_weights(tmp_path / name)
    assert not mark.exists()


GADGETS = {
    "os.system": (os.system, "touch {mark}"),
    "eval": (builtins.eval, "__import__('pathlib').Path({mark!r}).touch()"),
    "exec": (builtins.exec, "import pathlib; pathlib.Path({mark!r}).touch()"),
    "subprocess": (subprocess.check_output, ["touch", "{mark}"]),
    "pathlib": (Path.touch, Path("{mark}")),
    "torch.save": (torch.save, "", "{mark}"),
    "torch.load": (torch.load, "{mark}"),
}


class Call:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("form", ["zip", "old", "pickle"])
@pytest.mark.parametrize("name", GADGETS)
def test_no_gadget_in_a_pth_is_run(name, form, tmp_path):
    mark = tmp_path / "mark"

    def fill(part):
        if isinstance(part, list):
            return [fill(p) for p in part]
        return type(part)(str(part).replace("{mark!r}", repr(str(mark))).replace("{mark}", str(mark)))

    function, *arguments = GADGETS[name]
    document = {"model": {"cls_token": torch.ones(1)}, "args": Call(function, *map(fill, arguments))}
    if form == "pickle":
        (tmp_path / "m.pth").write_bytes(pickle.dumps(document["args"], protocol=2))
    else:
        torch.save(document, tmp_path / "m.pth", _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(DataError, match=r"m\.pth: damaged, or holds more than tensors; nothing in it was run"):
        read_weights(tmp_path / "m.pth")
    assert not mark.exists()


@every_draw
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_no_damage_of_a_file_causes_another_error(draw, suffix, tmp_path):
    names = ("cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.mlp.fc1.weight")
    path = tmp_path / f"m{suffix}"
    save_weights(Weights(path, {name: torch.ones(3, 5) for name in names}, CONFIG, True), path)
    data, read = path.read_bytes(), []

    @fuzz(draw, st.lists(MUTATION, min_size=1, max_size=2), examples=125)
    def try_one(mutations):
        path.write_bytes(mutate(data, mutations))
        try:
            read_weights(path)
        except InputError as error:
            read.append(str(error))
        else:
            read.append(None)

    assert 0 < read.count(None) < len(read)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("m.safetensors", b"garbage", "damaged, or not a safetensors file"),
        ("m.pth", b"garbage", "damaged, or holds more than tensors"),
        ("m.pth", None, "no such file"),
    ],
)
def test_files_that_cannot_be_read_are_named(name, data, message, tmp_path):
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=f"{name}: {message}"):
        read_weights(tmp_path / name)


def test_another_architecture_is_named_by_its_first_difference(tmp_path):
    model = MAE(CONFIG)
    deeper = dict(model.state_dict(), **{"blocks.1.norm1.weight": torch.zeros(192)})
    with pytest.raises(DataError, match=r"another architecture, blocks.1.norm1.weight is not in the model"):
        load_strictly(model, Weights(tmp_path, deeper, None, True))
    wider = dict(model.state_dict(), cls_token=torch.zeros(1, 1, 8))
    with pytest.raises(DataError, match=r"another architecture, cls_token is \(1, 1, 8\) in the file and \(1, 1, 192\)"):
        load_strictly(model, Weights(tmp_path, wider, None, True))
    with pytest.raises(DataError, match="holds no state dict"):
        torch.save({"model": [1, 2]}, tmp_path / "m.pth")
        read_weights(tmp_path / "m.pth")
