"""Other libraries' masked autoencoders: with our weights they compute the reference's loss and train as it does, or it is
stated."""

import os
from functools import partial
from pathlib import Path

import pytest
import torch

from fastmae.benchmarks import peers
from fastmae.benchmarks.cli import main
from fastmae.benchmarks.peers.hugging_face import hf_weights
from fastmae.benchmarks.timing import LossesDiffer, check_losses
from fastmae.benchmarks.training.contenders import NAMES, Workload, make
from fastmae.benchmarks.training.step import measure_steps, table
from fastmae.errors import InputError
from fastmae.model.config import preset

CPU = torch.device("cpu")
CLONE = os.environ.get("FASTMAE_CROSSMAE")


def workload(**more):
    config = preset("tiny", norm_pix_loss=True, img_size=32, depth=2, decoder_depth=2)
    return Workload(name="tiny", config=config, batch=2, device=CPU, **more)


def losses(contender):
    return contender.loss(contender.images, 7).item(), contender.timed_loss().item()


@pytest.mark.parametrize(("name", "package"), [("hf", "transformers"), ("lightly", "lightly")])
def test_a_peer_trains_on_the_references_loss(name, package):
    pytest.importorskip(package, reason=f"{package} is not installed", exc_type=ImportError)
    expected, found = make("rival", workload()), peers.make_peer(name, workload())
    check_losses({"rival": losses(expected), name: losses(found)}, CPU)
    before = losses(found)
    for contender in (expected, found):
        contender.step()
    check_losses({"rival": losses(expected), name: losses(found)}, CPU)  # and so have its gradients
    assert losses(found)[1] < 0.99 * before[1]


@pytest.mark.skipif(CLONE is None, reason="FASTMAE_CROSSMAE names no clone of TonyLianLong/CrossMAE")
@pytest.mark.filterwarnings("ignore:.*torch.cuda.amp.autocast", "ignore:.*CUDA is not available")
def test_crossmae_has_the_references_encoder_and_a_loss_of_its_own(capsys):
    expected, found = make("rival", workload()), peers.make_peer("crossmae", workload(crossmae=Path(CLONE)))
    check_losses({"rival": losses(expected), "crossmae": losses(found)}, CPU, peers.OTHER_LOSS)
    with pytest.raises(LossesDiffer, match="crossmae trains on another loss"):
        check_losses({"rival": losses(expected), "crossmae": losses(found)}, CPU)
    before = losses(found)
    found.step()
    assert losses(found)[0] != before[0] and losses(found)[1] < 0.99 * before[1]  # the encoder trains too
    assert capsys.readouterr().out == ""


def test_hugging_faces_names_are_those_of_transformers_5():
    weights = workload().weights()
    found = hf_weights(weights)
    blocks = ["vit.layers.0", "vit.layers.1", "decoder.decoder_layers.0", "decoder.decoder_layers.1"]
    parts = [f"attention.{w}_proj" for w in "qkvo"] + ["layernorm_before", "layernorm_after", "mlp.fc1", "mlp.fc2"]
    layers = ["vit.embeddings.patch_embeddings.projection", "vit.layernorm", "decoder.decoder_embed", "decoder.decoder_norm",
              "decoder.decoder_pred", *(f"{block}.{part}" for block in blocks for part in parts)]  # fmt: skip
    tables = [
        "vit.embeddings.cls_token",
        "vit.embeddings.position_embeddings",
        "decoder.mask_token",
        "decoder.decoder_pos_embed",
    ]
    assert found.keys() == {*tables, *(f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias"))}
    qkv = [found[f"vit.layers.1.attention.{which}_proj.weight"] for which in "qkv"]
    assert torch.equal(torch.cat(qkv), weights["blocks.1.attn.qkv.weight"])
    assert torch.equal(found["decoder.decoder_layers.0.layernorm_after.bias"], weights["decoder_blocks.0.norm2.bias"])
    assert sum(value.numel() for value in found.values()) == sum(value.numel() for value in weights.values())


@pytest.mark.parametrize(("name", "package"), [("hf", "transformers"), ("lightly", "lightly"), ("lightly", "timm")])
def test_a_missing_package_is_named_with_its_command_before_anything_is_measured(name, package, monkeypatch, capsys):
    monkeypatch.setattr(peers, "find_spec", lambda name: None if name == package else object())
    assert main(["step", "--device", "cpu", "--models", "tiny", "--contenders", "fastmae", name]) == 2
    start = f"fastmae bench: contender {name} needs {package}, which is not installed: pip install -c constraints.txt "
    assert capsys.readouterr().err == f"{start}{peers.PACKAGES[name]}\n"


def test_crossmae_needs_a_clone(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(peers, "find_spec", lambda name: object())
    assert main(["step", "--device", "cpu", "--models", "tiny", "--contenders", "crossmae"]) == 2
    assert "contender crossmae needs --crossmae CLONE" in capsys.readouterr().err
    assert main(["step", "--device", "cpu", "--models", "tiny", "--contenders", "crossmae", "--crossmae", str(tmp_path)]) == 2
    missing = f"{tmp_path}/models_cross.py: not found; give a clone of github.com/TonyLianLong/CrossMAE"
    assert capsys.readouterr().err == f"fastmae bench: {missing}\n"


def test_a_clone_that_is_not_there_is_named_before_anything_is_measured(monkeypatch, capsys):
    monkeypatch.setattr("fastmae.benchmarks.training.step.matmul_flops", lambda device: pytest.fail("was measured"))
    assert main(["step", "--device", "cpu", "--models", "base", "--reference", "nowhere"]) == 2
    assert "nowhere/models_mae.py: not found; give a clone of github.com/facebookresearch/mae" in capsys.readouterr().err


def test_peers_take_square_images_only():
    config = preset("tiny", img_size=(32, 48))
    with pytest.raises(InputError, match=r"contender hf takes square images, got \(32, 48\)"):
        peers.make_peer("hf", Workload(name="tiny", config=config, batch=2, device=CPU))


class ForgedWorker:
    """Of a contender whose losses are given by its name."""

    losses_of: dict = {}  # noqa: RUF012

    def __init__(self, build: partial, device):
        assert (build.func is peers.make_peer) == (build.args[0] in peers.NAMES)
        self.name = build.args[0]

    __enter__ = lambda self: self  # noqa: E731
    __exit__ = ask_losses = lambda self, *_: None
    losses = lambda self, seed: self.losses_of.get(self.name, (1.0, 1.0))  # noqa: E731
    seconds = lambda self, calls: 1.0  # noqa: E731
    peak_memory = lambda self: 2**30  # noqa: E731
    description = lambda self: f"what {self.name} does"  # noqa: E731


@pytest.fixture
def forged(monkeypatch):
    monkeypatch.setattr("fastmae.benchmarks.training.step.Worker", ForgedWorker)
    monkeypatch.setattr("fastmae.benchmarks.training.step.matmul_flops", lambda device: 1e12)
    monkeypatch.setattr(peers, "check_peers", lambda contenders, crossmae: None)
    return partial(monkeypatch.setattr, ForgedWorker, "losses_of")


def test_peers_are_measured_beside_ours_and_their_work_is_stated(forged):
    forged({"crossmae": (1.0, 2.0)})
    found = measure_steps(["tiny"], [2], CPU, rounds=1, image_size=32, contenders=["crossmae", "hf", "fastmae", "rival"])
    rows = {r["contender"]: r for r in found["rows"]}
    assert list(rows) == ["rival", "fastmae", "hf", "crossmae"]
    assert all(r["speed_over_rival"] == 1.0 for r in rows.values())
    assert rows["crossmae"]["share_of_matmul"] is None and rows["hf"]["share_of_matmul"] > 0  # MFU is of the official work
    assert [line[6] for line in table(found)[1:]][-1] == "-"
    assert [n for n in found["notes"] if "what" in n] == ["hf: what hf does", "crossmae: what crossmae does"]


@pytest.mark.parametrize(("name", "wrong", "message"), [
    ("hf", (1.0, 2.0), "hf trains on another loss"),
    ("crossmae", (1.1, 2.0), "crossmae computes another loss"),
    ("crossmae", (1.0, float("nan")), "crossmae trains on another loss"),
])  # fmt: skip
def test_a_peer_that_does_other_work_ends_the_benchmark(name, wrong, message, forged, capsys):
    forged({name: wrong})
    assert main(["step", "--device", "cpu", "--models", "tiny", "--batches", "2", "--contenders", name, *NAMES]) == 1
    assert message in capsys.readouterr().err
