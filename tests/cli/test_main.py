"""The command line as a user meets it: every wrong input is one line that names the thing, exit code 2, no traceback."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from fastmae import MAE, ModelConfig
from fastmae.model.block.trial import Variant
from fastmae.model.weights import read_weights, save_model
from fastmae.train.cli.main import COMMANDS, main
from fastmae.train.distributed.launcher import RankInfo
from fastmae.train.doctor import machine
from tests.support.pictures import make_picture

TINY = ["--img-size", "32", "--patch-size", "8", "--batch-size", "4", "--steps", "1", "--warmup-epochs", "0", "--workers", "0",
        "--device", "cpu"]  # fmt: skip
CONFIG = ModelConfig(img_size=32, patch_size=8, embed_dim=192, depth=1, num_heads=3, norm_pix_loss=True,
                     decoder_embed_dim=64, decoder_depth=1, decoder_num_heads=2)  # fmt: skip


@pytest.fixture
def world(shard_folder, image_folder, tmp_path):
    """Everything a command may be pointed at, good and bad, by name."""
    paths = {"shards": tmp_path / "shards", "images": image_folder, "out": tmp_path / "out", "root": tmp_path}
    shutil.copytree(shard_folder, paths["shards"])
    for name in ("empty", "cut", "missing", "lying"):
        paths[name] = tmp_path / name
        paths[name].mkdir()
    for name in ("cut", "missing", "lying"):
        shutil.copytree(shard_folder, paths[name], dirs_exist_ok=True)
    os.truncate(paths["cut"] / "shard-000001.tar", 5000)
    (paths["missing"] / "shard-000001.tar").unlink()
    tars = [paths["lying"] / f"shard-00000{i}.tar" for i in (0, 1)]
    for tar in tars:  # another tar of the length that the index states
        tar.write_bytes(bytes(tar.stat().st_size))
    paths["file"] = tmp_path / "file"
    paths["file"].write_text("not a folder")
    paths["page"] = tmp_path / "page.jpg"
    paths["page"].write_text("<html></html>")
    paths["unfinished"], paths["dangling"] = tmp_path / "unfinished", tmp_path / "dangling"
    for name in ("unfinished", "dangling"):
        paths[name].mkdir()
    shutil.copy(shard_folder / "shard-000000.tar", paths["unfinished"])
    (paths["unfinished"] / ".unfinished").touch()
    (paths["dangling"] / "gone.jpg").symlink_to(tmp_path / "nowhere")
    paths["full"], paths["encoder"], paths["garbage"] = (tmp_path / n for n in ("m.safetensors", "e.pth", "g.pth"))
    model = MAE(CONFIG)
    save_model(model, paths["full"])
    torch.save(
        {"model": {n: t for n, t in model.state_dict().items() if "decoder" not in n and n != "mask_token"}}, paths["encoder"]
    )
    paths["garbage"].write_bytes(b"garbage")
    return paths


SEED = f"seed must be an integer from 0 to {2**64 - 1} (64 bits)"
PRETRAIN = ["pretrain", "tiny", "--data", "{shards}", "--out", "{out}", *TINY]
BAD = [  # the command, what its one line must say
    (["pretrian", "tiny"], "no such command: fastmae pretrian; the commands are shards, pretrain, "),
    (["shards", "buid"], "no such command: fastmae shards buid; the commands are build, verify, "),
    (["pretrain", "--data", "{shards}", "--out", "{out}"], "give a preset (tiny, small, base, large, huge) or --recipe"),
    ([*PRETRAIN, "--recipe", "reference-b"], "recipe reference-b is not for preset tiny"),
    ([*PRETRAIN, "--mask-ratio", "0"], "mask ratio must lie strictly between 0 and 1, got 0.0"),
    ([*PRETRAIN, "--mask-ratio", "1"], "mask ratio must lie strictly between 0 and 1, got 1.0"),
    ([*PRETRAIN, "--mask-ratio", "0.99"], "mask ratio 0.99 keeps 0 of 16 patches"),
    (
        [*PRETRAIN, "--img-size", "33"],
        "image size (33, 33) must be (height, width), each a positive multiple of the patch size 8",
    ),
    ([*PRETRAIN, "--img-size", "32", "32", "32"], "img-size takes one number or height and width"),
    ([*PRETRAIN, "--in-chans", "4"], "images from files have 1 or 3 channels, the model asks for 4"),
    ([*PRETRAIN, "--batch-size", "0"], "batch-size must be at least 1, got 0"),
    ([*PRETRAIN, "--effective-batch", "6"], "effective batch 6 must be a multiple of 4 per process"),
    ([*PRETRAIN, "--blr", "-1"], "blr must be positive"),
    ([*PRETRAIN, "--seed", "-1"], f"{SEED}, got -1"),
    (
        [*PRETRAIN, "--seed", str(2**64)],
        f"{SEED}, got {2**64}",
    ),
    ([*PRETRAIN, "--crop-scale", "0.5", "0.2"], "crop scale must be two rising numbers"),
    ([*PRETRAIN, "--data", "{empty}"], "no shards; give a folder with index.json or tars"),
    ([*PRETRAIN, "--data", "{root}/nowhere"], "nowhere: no such shard or folder"),
    ([*PRETRAIN, "--data", "pipe:true"], "pipe: runs shell commands and is refused"),
    ([*PRETRAIN, "--data", "{{pipe:touch {root}/ran,pipe:true}}"], "pipe: runs shell commands and is refused"),
    ([*PRETRAIN, "--data", "a-{{000..099.tar"], "braces do not match"),
    ([*PRETRAIN, "--data", "{unfinished}"], "the build of these shards was not finished"),
    ([*PRETRAIN, "--attention", "cudnn"], "attention cudnn does not work here"),
    ([*PRETRAIN, "--attention", "xformers"], "attention xformers does not work here"),
    ([*PRETRAIN, "--epochs", "inf"], "must be finite"),
    ([*PRETRAIN, "--weight-decay", "nan"], "must be finite"),
    ([*PRETRAIN, "--data", "{missing}"], "shard-000001.tar: missing"),
    ([*PRETRAIN, "--data", "{cut}"], "shard-000001.tar: 5000 bytes, the index says"),
    ([*PRETRAIN, "--data", "{lying}", "--steps", "9"], "the index does not match the tar at offset"),
    ([*PRETRAIN, "--out", "{file}/run"], "cannot be written, Not a directory; choose another output folder"),
    ([*PRETRAIN, "--resume", "{root}/step-0000001"], "step-0000001: no such folder; give a checkpoint of a run, or a run"),
    ([*PRETRAIN, "--resume", "exact:{root}/step-0000001"], "manifest.json: missing or damaged"),
    (["shards", "build", "{root}/nowhere", "{out}"], "nowhere: not a folder"),
    (["shards", "build", "{empty}", "{out}"], "empty: no images; looked for .jpg"),
    (["shards", "build", "{images}", "{shards}"], "holds shards already; choose an empty folder"),
    (["shards", "build", "{images}", "{file}/x"], "cannot be written"),
    (["shards", "build", "{images}", "{out}", "--resize", "0"], "resize must be a positive number of pixels or none, got '0'"),
    (["shards", "build", "{images}", "{out}", "--workers", "-1"], "workers must not be negative"),
    (
        ["shards", "build", "{images}", "{out}", "--seed", "-1"],
        f"{SEED}, got -1",
    ),
    (["shards", "verify", "{empty}"], "has no index to verify against"),
    (["shards", "verify", "{cut}", "--workers", "0"], "restore those files"),
    (["shards", "info", "{empty}"], "index.json: cannot be read"),
    (["shards", "index", "{empty}"], "no *.tar in it"),
    (["shards", "index", "{shards}"], "has an index already"),
    (["shards", "index", "{empty}", "--workers", "-1"], "workers must not be negative"),
    ([*PRETRAIN, "--views", "0"], "views and the shuffle window must be >= 1"),
    ([*PRETRAIN, "--progressive", "0:12"], "image size 12 x 12 must be a multiple of the patch size 8"),
    ([*PRETRAIN, "--data", "s3://bucket/{{0..3}}.tar"], "pip install 'fsspec[s3]'"),
    (["demo", "--out", "{shards}"], "is not empty and not the folder of a demo"),
    (["shards", "build", "{images}", "{out}", "--quality", "0"], "quality must lie in 1..95, got 0"),
    (["shards", "build", "{images}", "{out}", "--samples-per-shard", "0"], "samples per shard must be at least 1"),
    (["reconstruct", "{encoder}", "{images}"], "holds an encoder only, and pixels need the decoder too"),
    (["reconstruct", "{garbage}", "{images}"], "holds more than tensors; nothing in it was run (Unsupported operand 103)"),
    (["reconstruct", "{empty}", "{images}"], "no complete checkpoint in this folder"),
    (["reconstruct", "{root}/nowhere", "{images}"], "nowhere: no such file or folder; give a run"),
    (["reconstruct", "{full}", "{page}"], "page.jpg: cannot be read as an image"),
    (["reconstruct", "{full}", "{dangling}"], "gone.jpg: cannot be read as an image"),
    (["reconstruct", "{full}", "{empty}"], "no images"),
    (["reconstruct", "{full}", "{root}/nowhere.jpg"], "no such image or folder"),
    (["reconstruct", "{full}", "{images}", "--mask-ratio", "1"], "mask ratio must lie strictly between 0 and 1"),
    (["reconstruct", "{full}", "{images}", "--out", "{file}/strip.png"], "strip.png: cannot be written"),
    (["reconstruct", "{full}", "{images}", "--count", "0"], "count must be at least 1"),
    (
        ["reconstruct", "{full}", "{images}", "--seed", "-1"],
        f"{SEED}, got -1",
    ),
    (["convert", "{full}", "{root}/m.onnx"], "must end in .safetensors or .pth"),
    (["convert", "{garbage}", "{root}/m.safetensors"], "damaged"),
    (["convert", "{full}", "{file}/m.pth"], "m.pth: cannot be written"),
]


@pytest.mark.parametrize(("arguments", "says"), BAD, ids=[says[:40] for _, says in BAD])
def test_wrong_input_is_one_line_and_exit_code_2(arguments, says, world, capsys):
    before = {p: p.read_bytes() for p in world["root"].rglob("*") if p.is_file()}
    assert main([a.format(**world) for a in arguments]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fastmae: ")]
    assert len(lines) == 1 and says in lines[0]
    assert "Traceback" not in lines[0]
    assert all(p.read_bytes() == data for p, data in before.items())  # nothing that was written is lost
    assert not (world["root"] / "ran").exists()


@pytest.mark.parametrize(("arguments", "says"), [
    (["pretrain"], "out"),
    (["shards", "build", "only-one"], "SHARDS"),
    ([*PRETRAIN[1:], "--steps", "many"], "many"),
    (["giant", *PRETRAIN[2:]], "tiny small base large huge"),
    ([*PRETRAIN[1:], "--recipe", "reference-z"], "reference-b reference-l"),
    ([*PRETRAIN[1:], "--attention", "flsh"], "auto xformers sdpa"),
    ([*PRETRAIN[1:], "--precision", "fp8"], "auto bf16 fp16 fp32"),
    ([*PRETRAIN[1:], "--device", "tpu"], "auto cpu cuda"),
    ([*PRETRAIN[1:], "--crop", "gpu"], "auto cpu device"),
])  # fmt: skip
def test_arguments_that_do_not_parse_exit_with_2_and_name_the_choices(arguments, says, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments if arguments[0] in ("pretrain", "shards") else ["pretrain", *arguments])
    assert stop.value.code == 2
    words = re.findall(r"\w[\w-]*", capsys.readouterr().err)
    assert [word for word in words if word in says.split()][-len(says.split()) :] == says.split()  # in the order of --help
    assert "doctor" not in words and ("Invalid" not in words or "None" not in words)  # nor another command's settings


@pytest.mark.parametrize("command", [c for c in COMMANDS if c != "bench"])  # a program of its own
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and "--help" in text
    assert not re.search(r"default:\s[│\s]*None", text) and not re.search(r"^│ (PATH|STR|INT) ", text, re.M)


def test_from_images_to_a_picture(image_folder, tmp_path, capsys):
    assert (
        main(
            [
                "shards",
                "build",
                str(image_folder),
                str(tmp_path / "s"),
                "--resize",
                "36",
                "--workers",
                "1",
                "--samples-per-shard",
                "10",
            ]
        )
        == 0
    )
    assert "37 images in 4 shards" in capsys.readouterr().out
    run = ["pretrain", "tiny", "--data", str(tmp_path / "s"), "--out", str(tmp_path / "run"), *TINY]
    assert main(run) == 0
    heights = []
    for images in (tmp_path / "s", image_folder, next(image_folder.rglob("*.jpg"))):
        arguments = ["reconstruct", str(tmp_path / "run"), str(images), "--out", str(tmp_path / "strip.png"), "--count", "3"]
        assert main(arguments) == 0
        with Image.open(tmp_path / "strip.png") as picture:
            heights.append(picture.height)
    assert heights[0] == heights[1] == heights[2] + 2 * 260
    model = tmp_path / "run" / "step-0000001" / "model.safetensors"
    assert main(["convert", str(model), str(tmp_path / "m.pth")]) == 0
    assert main(["convert", str(tmp_path / "m.pth"), str(tmp_path / "m.safetensors")]) == 0
    one, two = read_weights(model), read_weights(tmp_path / "m.safetensors")
    assert all(torch.equal(t, two.tensors[n]) for n, t in one.tensors.items()) and two.config.norm_pix_loss
    assert main(["convert", str(model), str(tmp_path / "e.pth"), "--encoder-only"]) == 0
    assert read_weights(tmp_path / "e.pth").is_encoder_only


def test_bad_images_are_named_and_the_rest_is_built(image_folder, tmp_path, capsys):
    source = tmp_path / "source"
    shutil.copytree(image_folder, source)
    (source / "ant" / "page.jpg").write_text("<html></html>")
    assert main(["shards", "build", str(source), str(tmp_path / "out"), "--workers", "0"]) == 0
    found = capsys.readouterr()
    assert re.search(r"skipped: .*page\.jpg: UnidentifiedImageError", found.err)
    assert "37 images in 1 shards" in found.out and "1 bad images skipped" in found.out


def test_single_settings_override_a_recipe(shard_folder, tmp_path):
    run = ["pretrain", "--recipe", "reference-b", "--data", str(shard_folder), "--out", str(tmp_path), "--device", "cpu",
           "--img-size", "16", "32", "--patch-size", "16", "--mask-ratio", "0.5", "--norm-pix-loss", "False",
           "--decoder-depth", "1", "--effective-batch", "4", "--batch-size", "2",
 "--steps", "1", "--warmup-epochs", "0", "--workers", "0"]  # fmt: skip
    assert main(run) == 0
    state = json.loads((tmp_path / "step-0000001" / "state.json").read_text())
    model = ModelConfig.from_json(state["model"])
    assert (model.img_size, model.depth, model.decoder_depth, model.norm_pix_loss) == ((16, 32), 12, 1, False)
    assert (state["recipe"]["effective_batch"], state["recipe"]["mask_ratio"]) == (4, 0.5)


def test_shards_are_described_and_verified_and_damage_is_named(world, capsys):
    folder = world["shards"]
    assert main(["shards", "info", str(folder)]) == 0
    text = capsys.readouterr().out
    assert "shards: 4" in text and "samples: 37" in text and "ant" in text
    assert main(["shards", "verify", str(folder), "--decode", "--workers", "1"]) == 0
    assert "every byte matches the index" in capsys.readouterr().out
    data = bytearray((folder / "shard-000002.tar").read_bytes())
    data[2000] ^= 4
    (folder / "shard-000002.tar").write_bytes(data)
    assert main(["shards", "verify", str(folder), "--workers", "0"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert any("shard-000002.tar: " in line and "at offset " in line for line in lines)
    assert lines[-1].startswith("fastmae: ") and "1 errors" not in lines[-1]


def test_tars_of_others_are_indexed_and_trained_on(world, tmp_path, capsys):
    with tarfile.open(world["empty"] / "theirs.tar", "w") as tar:
        for i in range(9):
            make_picture(i).save(path := tmp_path / f"{i}.jpg")
            tar.add(path, f"{i}.jpg")
            (tmp_path / "label").write_text(str(i % 2))
            tar.add(tmp_path / "label", f"{i}.cls")
    (tmp_path / "names").write_text("cat\ndog\n")
    out = tmp_path / "index"
    assert (
        main(
            ["shards", "index", str(world["empty"]), "--out", str(out), "--classes", str(tmp_path / "names"), "--workers", "0"]
        )
        == 0
    )
    assert "9 images in 1 shards" in capsys.readouterr().out
    assert sorted(p.name for p in world["empty"].iterdir()) == ["theirs.tar"]
    assert main(["pretrain", "tiny", "--data", str(out), "--out", str(tmp_path / "run"), *TINY]) == 0


def test_doctor_says_what_is_used_and_why_not_more(capsys):
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    for word in ("torch ", "triton ", "devices:", "kernels: FASTMAE_KERNELS=auto", "auto uses", "xformers",
                 "/dev/shm: ", "open files: ", "--workers ",
                 "(optional: a run's TensorBoard log)", "matplotlib ", "jinja2 ",
                 "blocks (cpu): torch's own operations; fused ones are measured on cuda alone"):  # fmt: skip
        assert word in text


def test_doctor_says_what_is_fused_and_what_is_not_measured_yet(monkeypatch):
    known = {50: Variant("short", ("add_norm", "gelu")), 197: Variant("sdpa")}
    monkeypatch.setattr(machine, "MEASURED", ("cpu",))
    monkeypatch.setattr(machine, "known_block", lambda task: known.get(task.shape.tokens))
    lines = machine._blocks("cpu", torch.bfloat16)
    assert len(lines) == 7 and lines[0] == "blocks (cpu, torch.bfloat16, residual stream fp32):"
    assert lines[1] == "  50 tokens, 12 heads, width 768, MLP 3072: auto uses attention short + add_norm + gelu"
    assert lines[2].endswith("MLP 2048: auto uses attention sdpa, nothing fused")
    assert lines[4].endswith("MLP 5120: not measured yet, which the first run of such a model does")


def test_doctor_warns_of_what_is_short(capsys, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(64 << 20, 0, 64 << 20))
    monkeypatch.setattr("resource.getrlimit", lambda which: (256, 1 << 20))
    many = RankInfo(size=64, local_size=64, launcher="torchrun")
    monkeypatch.setattr("fastmae.train.doctor.machine.read_launcher", lambda: many)
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "/dev/shm: 0.1 of 0.1 GiB free; short for streams and NCCL, give it 8 GiB (docker: --shm-size 8g)" in text
    assert "open files: 256 a process, 1048576 at most; too few to keep many shards open" in text and "ulimit -n 4096" in text
    assert "set OMP_NUM_THREADS=1" in text


@pytest.mark.parametrize("command", [["doctor"], ["shards", "info", "x"], ["pretrain", "tiny", "--data", "x", "--out", "y"]])
def test_a_wrong_choice_of_kernels_stops_every_command(command, capsys, monkeypatch):
    monkeypatch.setenv("FASTMAE_KERNELS", "cuda")
    assert main(command) == 2
    assert "FASTMAE_KERNELS must be one of auto, triton, torch, got 'cuda'" in capsys.readouterr().err


def test_a_demo_that_is_stopped_ends_as_interrupted(tmp_path, monkeypatch, capsys):
    pytest.importorskip("skimage")
    monkeypatch.setattr("fastmae.train.cli.demo.write_shards", lambda *_, **__: None)
    monkeypatch.setattr("fastmae.train.cli.demo.pretrain", lambda recipe, run: run.out / "step-0000003")
    assert main(["demo", "--out", str(tmp_path), "--steps", "4"]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "fastmae: the demo was stopped; the next one starts from step 0"


def test_demo_goes_the_whole_way(tmp_path):
    pytest.importorskip("skimage")
    assert main(["demo", "--out", str(tmp_path), "--steps", "2", "--workers", "0"]) == 0
    for name in ("shards/index.json", "metrics.jsonl", "loss.png", "reconstruction.png", "step-0000002/model.safetensors"):
        assert (tmp_path / name).is_file()
    assert list((tmp_path / "tensorboard").glob("events*"))
    assert "<h1>MAE ViT, width 192, depth 4, patches of 12, images 96 × 96</h1>" in (tmp_path / "report.html").read_text(
        "utf-8"
    )
    (tmp_path / "mine.txt").write_text("kept")
    assert main(["demo", "--out", str(tmp_path), "--steps", "2", "--workers", "0"]) == 0
    assert (tmp_path / "mine.txt").read_text() == "kept"


def test_a_full_disk_is_one_line(image_folder, tmp_path, capsys, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device", str(tmp_path / "out" / "shard"))

    monkeypatch.setattr("fastmae.shards.build._append", full)
    assert main(["shards", "build", str(image_folder), str(tmp_path / "out"), "--workers", "0"]) == 2
    assert re.search(r"^fastmae: .*shard: No space left on device$", capsys.readouterr().err, re.M)


def test_a_missing_package_is_named_with_its_install_command(world, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "simplejpeg", None)
        assert main(["reconstruct", str(world["full"]), str(world["images"])]) == 2
    assert "decoding JPEGs needs simplejpeg" in (text := capsys.readouterr().err) and "pip install simplejpeg" in text
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    assert main([a.format(**world) for a in PRETRAIN]) == 0  # and resumes, where it can
    assert "TensorBoard's log needs tensorboard" in (text := capsys.readouterr().err) and "pip install tensorboard;" in text
    assert (world["out"] / "metrics.jsonl").is_file() and not (world["out"] / "tensorboard").exists()


def test_a_console_that_cannot_be_written_does_not_change_the_exit_code(tmp_path):
    """As of a run whose console is a file on a full disk."""
    code = "import sys; from fastmae.train.cli import interrupt, main; interrupt.end(main.main(['shards', 'info', '/nowhere']))"
    with Path("/dev/full").open("w") as full:
        assert subprocess.run([sys.executable, "-c", code], stderr=full, check=False).returncode == 2
