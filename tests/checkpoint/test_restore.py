"""Runs that go on from checkpoints as older versions wrote them."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from fastmae import MAE, DataError
from fastmae.model.weights import save_model
from fastmae.train.checkpoint.format import find_checkpoint, verify, write_manifest
from fastmae.train.pretrain.pretrain import pretrain
from tests.support.runs import MODEL, RECIPE, losses, run_of, tensors_of
from tests.support.saves import damages


def old_form(new, folder, schema):
    """The checkpoint ``new`` as versions before this one would have written it."""
    folder.mkdir(parents=True)
    tensors, state = tensors_of(new), json.loads((new / "state.json").read_text())
    model = MAE(MODEL)
    model.load_state_dict({n.removeprefix("model/"): t for n, t in tensors.items() if n.startswith("model/")})
    save_model(model, folder / "model.safetensors")
    moments = {n.removeprefix("optimizer/"): t for n, t in tensors.items() if n.startswith("optimizer/")}
    save_file(moments, folder / "optimizer.safetensors")
    state = {name: state[name] for name in ("step", "data", "model", "recipe", "versions")}
    if schema == 1:
        state["data"] = "0123456789abcdef"  # a fingerprint that is not made any more
        for name in ("views", "shuffle_window", "progressive"):
            del state["recipe"][name]
    (folder / "state.json").write_text(json.dumps({"schema": schema, **state}, indent=1))
    write_manifest(folder)
    return folder


@pytest.fixture(scope="module")
def training(shard_folder, tmp_path_factory):
    """A run of six steps, and its checkpoints of steps 3 and 6."""
    out = tmp_path_factory.mktemp("training")
    pretrain(RECIPE, run_of(shard_folder, out, save_every=3))
    return out


@pytest.mark.parametrize("schema", [1, 2])
def test_training_goes_on_from_an_older_schema_with_the_same_bits(schema, training, shard_folder, tmp_path):
    old_form(training / "step-0000003", tmp_path / "step-0000003", schema)
    assert find_checkpoint(tmp_path) == (tmp_path / "step-0000003", [])
    new, whole = tensors_of(pretrain(RECIPE, run_of(shard_folder, tmp_path))), tensors_of(training / "step-0000006")
    trained = [name for name in whole if name.startswith(("model/", "optimizer/"))]
    assert len(trained) > 100 and new.keys() == whole.keys()
    assert [name for name in trained if not torch.equal(new[name], whole[name])] == []
    assert losses(tmp_path) == {step: loss for step, loss in losses(training).items() if step > 3}


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
def test_damage_to_an_older_schema_is_found_too(name, training, tmp_path):
    path = old_form(training / "step-0000003", tmp_path / "step-0000003", 2) / name
    whole = path.read_bytes()
    for damage, data in damages(whole, seed=1).items():
        path.write_bytes(data)
        assert find_checkpoint(tmp_path)[0] is None, damage
    path.unlink()
    with pytest.raises(DataError, match=f"{name}: missing"):
        verify(path.parent)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda moments: moments.pop("exp_avg/norm.weight"), "optimizer/exp_avg/norm.weight is missing, or of another shape"),
        (lambda moments: moments.update({"exp_avg/norm.weight": torch.zeros(2)}), "norm.weight is missing, or of another"),
    ],
)
def test_moments_of_an_older_schema_that_do_not_fit_are_named(spoil, message, training, shard_folder, tmp_path):
    folder = old_form(training / "step-0000003", tmp_path / "step-0000003", 2)
    moments = {n.removeprefix("optimizer/"): t for n, t in tensors_of(training / "step-0000003").items() if "optimizer" in n}
    spoil(moments)
    save_file(moments, folder / "optimizer.safetensors")
    (folder / "manifest.json").unlink(missing_ok=True)
    write_manifest(folder)
    with pytest.raises(DataError, match=message):
        pretrain(replace(RECIPE, steps=4), run_of(shard_folder, tmp_path))
