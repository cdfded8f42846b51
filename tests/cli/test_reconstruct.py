"""``fastmae reconstruct``: the picture's format is the one that its suffix names, and a damaged checkpoint is not drawn."""

from pathlib import Path

import pytest
from PIL import Image

from fastmae import MAE, ModelConfig
from fastmae.errors import InputError
from fastmae.model.weights import save_model
from fastmae.train.checkpoint.format import MODEL
from fastmae.train.cli import reconstruct
from fastmae.train.cli.main import main
from fastmae.train.cli.reconstruct import picture_format, reconstruct_images
from tests.support.pictures import make_picture

CONFIG = ModelConfig(img_size=32, patch_size=8, embed_dim=24, depth=1, num_heads=2,
                     decoder_embed_dim=8, decoder_depth=1, decoder_num_heads=2)  # fmt: skip


@pytest.fixture
def model_and_image(tmp_path) -> tuple[Path, Path]:
    save_model(MAE(CONFIG), tmp_path / "m.safetensors")
    make_picture(0, (5, 9)).save(tmp_path / "small.png")  # smaller than the model's images: enlarged
    return tmp_path / "m.safetensors", tmp_path / "small.png"


@pytest.mark.parametrize(("name", "kind"), [
    ("x.png", "PNG"), ("x.jpg", "JPEG"), ("x.JPEG", "JPEG"), ("x.webp", "WEBP"), ("a.b.tiff", "TIFF"), ("x", "PNG"),
])  # fmt: skip
def test_the_suffix_names_the_format(name, kind, model_and_image, tmp_path):
    assert main(["reconstruct", *map(str, model_and_image), "--out", str(tmp_path / name)]) == 0
    with Image.open(tmp_path / name) as picture:
        assert picture.format == kind and picture.convert("RGB").size[0] == 4 * 260 + 4


@pytest.mark.parametrize("suffix", [".xyz", ".v2", ".psd", ".h5", ".xbm"])  # unknown x 2, read only, no codec, 1 bit
def test_another_suffix_is_refused_before_the_model_is_loaded(suffix, tmp_path, capsys):
    out = tmp_path / f"strip{suffix}"
    assert main(["reconstruct", str(tmp_path / "absent.pth"), str(tmp_path), "--out", str(out)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"strip{suffix}: suffix {suffix} is no image format that can be written here; use .png, .jpg, .webp" in line
    assert not out.exists()


def test_the_suffixes_that_the_error_names_can_be_written():
    with pytest.raises(InputError) as refused:
        picture_format(Path("x.xyz"))
    named = str(refused.value).split("use ")[1].replace(" or ", ", ").split(", ")
    assert [picture_format(Path(f"x{suffix}")) for suffix in named] == ["PNG", "JPEG", "WEBP", "TIFF", "PDF"]


def test_a_picture_too_large_for_its_format_is_refused_and_the_earlier_file_kept(model_and_image, tmp_path, monkeypatch):
    monkeypatch.setattr(reconstruct, "strip", lambda _: Image.new("RGB", (1, 20000)))
    (tmp_path / "x.webp").write_bytes(b"earlier")
    with pytest.raises(InputError, match=r"WEBP cannot hold 1 x 20000 pixels; draw fewer images with --count, or write \.png"):
        reconstruct_images(*model_and_image, tmp_path / "x.webp")
    assert (tmp_path / "x.webp").read_bytes() == b"earlier"


def test_a_damaged_checkpoint_is_not_drawn(shard_folder, tmp_path, capsys):
    sizes = ["--img-size", "32", "--patch-size", "8", "--batch-size", "4", "--steps", "1", "--warmup-epochs", "0"]
    run = ["pretrain", "tiny", "--data", str(shard_folder), "--out", str(tmp_path), *sizes, "--workers", "0", "--device", "cpu"]
    assert main(run) == 0
    path = tmp_path / "step-0000001" / MODEL
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(data)
    assert main(["reconstruct", str(path.parent), str(shard_folder), "--out", str(tmp_path / "s.png")]) == 2
    assert "model.safetensors: damaged" in capsys.readouterr().err and not (tmp_path / "s.png").exists()
