"""Names that are no UTF-8, of folders, files, classes and members of tars: a run reads and writes them like all others.

Wherever a name is shown or kept as text, its bytes that are no UTF-8 are Python's escapes: ``\\udcff`` for the byte 255.
"""

import io
import json
import os
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from fastmae.data.pool import WorkerPool
from fastmae.errors import DataError
from fastmae.model.weights import load_model
from fastmae.shards.index import Index
from fastmae.train.cli.main import main
from fastmae.train.distributed.heartbeat import Heartbeat
from fastmae.train.distributed.world import World
from fastmae.train.pretrain import log as log_file
from fastmae.train.pretrain.log import RunLog
from tests.support import runs
from tests.support.pictures import make_picture
from tests.support.runs import records

FLAGS = [*runs.FLAGS, "--batch-size", "8", "--decoder-depth", "1", "--decoder-embed-dim", "64", "--decoder-num-heads", "2"]
SEEN = "\\udcff"


def odd(name: bytes) -> str:
    return os.fsdecode(name)


@pytest.fixture
def place(tmp_path):
    """A folder of an odd name, with images of odd names in a class of one."""
    folder = tmp_path / odd(b"od\xffd")
    images = folder / "images" / odd(b"cl\xffass")
    try:
        images.mkdir(parents=True)
    except OSError as error:
        pytest.skip(f"this file system takes UTF-8 alone: {error}")
    for i in range(9):
        make_picture(i).save(images / odd(b"\xff%d.jpg" % i))
    (images / odd(b"bad\xff.jpg")).write_bytes(b"none")
    return folder


def tar_of(folder: Path, path: Path) -> None:
    """A tar whose fourth image does not decode."""
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT, encoding="utf-8", errors="surrogateescape") as tar:
        for i, image in enumerate(sorted(folder.glob("*[0-9].jpg"))):
            data = image.read_bytes()[: 300 if i == 3 else None]
            member = tarfile.TarInfo(image.name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


@pytest.fixture
def run(monkeypatch):
    """Runs a command that ends well; returns what it prints, as the console of a program takes it."""

    def made(*words) -> str:
        console = io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace")
        for stream in ("stdout", "stderr"):
            monkeypatch.setattr(sys, stream, console)
        code = main([*map(str, words)])
        console.flush()
        text = console.buffer.getvalue().decode()
        assert code == 0, text
        return text

    return made


def test_from_images_to_a_report(place, run):
    shards, out = place / odd(b"s\xff"), place / odd(b"run\xff")
    text = run("shards", "build", place / "images", shards, "--workers", "1")
    assert f"od{SEEN}d/s{SEEN}: 9 images" in text and f"left out: {place}".replace("\udcff", SEEN) in text
    assert Index.load(shards).classes == (odd(b"cl\xffass"),)
    assert f"cl{SEEN}ass 9" in run("shards", "info", shards)
    run("shards", "verify", shards, "--decode", "--workers", "0")
    flags = ["pretrain", "tiny", "--data", shards, "--out", out, *FLAGS, "--draw-every", "2"]
    text = run(*flags, "--steps", "1", "--warmup-epochs", "0")
    assert f"done: 1 steps, {out}/step-0000001".replace("\udcff", SEEN) in text
    assert "is no UTF-8, as TensorBoard's log must be; training continues, with metrics.jsonl" in text
    assert f"resumed from {out}/step-0000001".replace("\udcff", SEEN) in run(*flags, "--steps", "2")
    assert {r["run"]["data"] for r in records(out) if r.get("event") == "start"} == {str(shards)}  # as it was given
    assert f"od{SEEN}d" in (out / "metrics.jsonl").read_text("ascii")
    run("report", out)
    page = (out / "report.html").read_text("utf-8")
    assert f"run{SEEN}" in page and f"s{SEEN}" in page
    image = place / "images" / odd(b"cl\xffass") / odd(b"\xff1.jpg")
    run("reconstruct", out, image, "--out", place / odd(b"p\xff.png"))
    weights = out / "step-0000002" / "model.safetensors"
    run("convert", weights, place / odd(b"m\xff.pth"))
    one, two = (load_model(path).state_dict() for path in (weights, place / odd(b"m\xff.pth")))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert (place / odd(b"p\xff.png")).is_file()


@pytest.mark.parametrize(("is_indexed", "workers"), [(True, "1"), (False, "0")], ids=["indexed", "streamed"])
def test_members_of_tars_are_read_and_those_that_do_not_decode_are_named(is_indexed, workers, place, run):
    data = place / odd(b"tars\xff")
    data.mkdir()
    tar_of(place / "images" / odd(b"cl\xffass"), data / odd(b"t\xff.tar"))
    if is_indexed:
        index = place / odd(b"index\xff")
        run("shards", "index", data, "--out", index, "--workers", "1")
        assert (
            json.loads((index / "index.json").read_text("ascii"))["shards"][0]["name"] == f"../{odd(b'tars')}\udcff/t\udcff.tar"
        )
        data = index
    text = run("pretrain", "tiny", "--data", data, "--out", place / "run", *FLAGS, "--steps", "3",
               "--workers", workers)  # fmt: skip
    (line,) = {line for line in text.splitlines() if line.startswith("replaced a sample that cannot be used: ")}
    assert f"/t{SEEN}.tar: " in line and f"{SEEN}3" in line and "cannot be decoded" in line
    assert any(odd(b"t\xff.tar: ") in r.get("sample", "") for r in records(place / "run"))


def test_what_ends_a_worker_keeps_the_name(monkeypatch):
    def work(task, at):
        raise DataError(odd(b"t\xff.tar: missing"))

    pool = WorkerPool(work, 1)
    try:
        pool.submit([0])
        with pytest.raises(DataError) as raised:
            pool.collect(30)
        assert str(raised.value) == odd(b"t\xff.tar: missing")
    finally:
        pool.close()


def test_what_ends_one_process_is_heard_by_the_others_under_any_name(monkeypatch):
    heartbeat = Heartbeat(World(0, 1, torch.device("cpu")))
    monkeypatch.setattr(heartbeat, "_thread", object())
    monkeypatch.setattr(heartbeat, "end", lambda: None)
    monkeypatch.setattr("time.sleep", lambda _: None)
    heartbeat.fail(ValueError(odd(b"t\xff.tar: missing")))
    assert heartbeat._to_send["failed"] == f"rank 0 has failed, ValueError: t{SEEN}.tar: missing"
    assert heartbeat._to_send["failed"].isascii()


def test_a_tracker_s_id_of_a_run_can_be_had(place):
    assert log_file._run_id(place) != log_file._run_id(place / "x")
    RunLog(place, is_main=True, first_step=0, total_steps=1).close()
