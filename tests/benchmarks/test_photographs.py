"""Real photographs, where they are: shards both ways, and a model that learns from them."""

import tarfile

import pytest

from fastmae.model.config import PRESETS
from fastmae.train.cli.main import main
from tests.support.runs import losses


@pytest.fixture(scope="module")
def folder(photos, tmp_path_factory):
    """The photographs as files, in folders of their classes."""
    root = tmp_path_factory.mktemp("photographs")
    for path in sorted(photos.glob("*.tar")):
        with tarfile.open(path) as tar:
            members = {m.name: tar.extractfile(m).read() for m in tar}
        for name, data in members.items():
            if name.endswith(".jpg"):
                kind = root / members[name.replace(".jpg", ".cls")].decode().strip()
                kind.mkdir(exist_ok=True)
                (kind / name).write_bytes(data)
    return root


@pytest.mark.parametrize(
    ("depth", "decoder"),
    [(2, ["--decoder-depth", "1", "--decoder-embed-dim", "64", "--decoder-num-heads", "4"]),
     pytest.param(12, ["--decoder-depth", "2"], marks=pytest.mark.all)],
    ids=["shallow", "tiny"],
)  # fmt: skip
def test_two_hundred_steps_on_photographs_lower_the_loss(depth, decoder, folder, tmp_path, monkeypatch):
    monkeypatch.setitem(PRESETS, "tiny", {**PRESETS["tiny"], "depth": depth})
    assert main(["shards", "build", str(folder), str(tmp_path / "shards"), "--resize", "256"]) == 0
    run = ["pretrain", "tiny", "--data", str(tmp_path / "shards"), "--out", str(tmp_path / "run"), "--img-size", "64",
           "--patch-size", "8", "--batch-size", "16", "--steps", "200", "--blr", "2e-2", "--no-norm-pix-loss",
           "--device", "cpu", "--log-every", "10", "--workers", "1", *decoder]  # fmt: skip
    assert main(run) == 0
    found = losses(tmp_path / "run")
    first, last = (sum(found[s] for s in steps) / 3 for steps in ((10, 20, 30), (180, 190, 200)))
    assert last < 0.7 * first
    strip = tmp_path / "strip.png"
    assert main(["reconstruct", str(tmp_path / "run"), str(tmp_path / "shards"), "--out", str(strip)]) == 0
    assert strip.stat().st_size > 10_000
