"""Real builds in real processes, killed for real: only whole shards are seen, nobody is left, and the bytes are the same."""

import contextlib
import itertools
import os
import random
import signal
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest
from PIL import Image

from fastmae import InputError
from fastmae.images.listing import list_images
from fastmae.images.recode import Recode
from fastmae.shards.build import recode_all, write_shards
from fastmae.shards.index import Index
from tests.support.builds import FORGE, SETTINGS, Build, begun
from tests.support.processes import wait_until
from tests.support.shards import contents


@pytest.fixture(scope="module")
def forge():
    process = subprocess.Popen([sys.executable, "-c", FORGE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    yield process
    process.stdin.close()
    process.wait(10)
    process.stdout.close()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """150 pictures that take some milliseconds each."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for i in range(150):
        folder = root / f"class{i % 3}"
        folder.mkdir(exist_ok=True)
        pixels = rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((800, 600), Image.Resampling.BICUBIC).save(folder / f"{i}.jpg")
    return root


@pytest.fixture(scope="module")
def whole(pictures, tmp_path_factory):
    """The folder of an uninterrupted build."""
    out = tmp_path_factory.mktemp("whole")
    write_shards(pictures, out, **SETTINGS)
    return out


def assert_only_whole_shards(out, whole, expected):
    for path in out.glob("*.tar"):
        assert path.read_bytes() == (whole / path.name).read_bytes()
        with tarfile.open(path) as tar:
            assert sum(name.endswith(".jpg") for name in tar.getnames()) == expected[path.name]
    known = {*(p.name for p in whole.iterdir()), ".unfinished", ".unfinished.removed"}
    assert all(p.name in known or p.name.endswith(".partial") for p in out.iterdir())


def test_a_build_that_is_killed_ten_times_gives_the_same_bytes(forge, pictures, whole, tmp_path):
    start = time.monotonic()
    Build(forge, pictures, tmp_path / "timed").wait()
    duration = time.monotonic() - start
    expected = {s.name: s.samples for s in Index.load(whole).shards}
    moments = random.Random(5)
    kills, finished, middle, marks = 0, 0, 0, {}
    while kills < 10 or not finished:
        out = tmp_path / f"out{finished}"
        build = Build(forge, pictures, out)
        moment = time.monotonic() + (moments.uniform(0, 0.6) * duration if kills < 10 else 60)
        while time.monotonic() < moment and build.is_running():
            for path in out.glob("*.tar"):  # while it runs: what is seen is whole
                assert path.stat().st_size == (whole / path.name).stat().st_size
            time.sleep(0.01)
        is_killed = build.is_running()
        if is_killed:
            os.kill(build.pid, signal.SIGKILL)
            kills += 1
        assert build.wait() == ""
        seen = {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in out.glob("*.tar")}
        notes = [f"{p.stem}.tar" for p in (out / ".unfinished").glob("shard-*.json")]
        assert {n: seen[n] for n in marks} == marks  # what was finished before is not made again
        marks = {n: seen[n] for n in notes}
        middle += is_killed and 0 < len(seen) < len(expected)
        assert_only_whole_shards(out, whole, expected)
        if (out / "index.json").exists() and not (out / ".unfinished").exists():
            if is_killed:  # in its last moment, when all was done
                with pytest.raises(InputError, match="holds shards already"):
                    write_shards(pictures, out, **SETTINGS)
            assert contents(out) == contents(whole)
            finished, marks = finished + 1, {}
    assert middle >= 5


@pytest.mark.parametrize(
    ("workers", "by", "how"),
    [
        (1, signal.SIGKILL, "killed by SIGKILL (out of memory?)"),
        (3, signal.SIGKILL, "killed by SIGKILL (out of memory?)"),
        (2, signal.SIGSEGV, "killed by SIGSEGV"),
    ],
)
def test_a_worker_that_is_killed_is_named_and_the_build_is_finished(workers, by, how, forge, pictures, whole, tmp_path):
    build = begun(forge, pictures, tmp_path / "out", workers)
    worker = max(build.processes())
    assert worker != build.pid
    os.kill(worker, by)
    line = build.wait().splitlines()[0]
    assert f"worker process {worker} was {how}" in line and line.endswith("; its work is done again")
    assert contents(tmp_path / "out") == contents(whole)


def test_a_stuck_worker_of_a_killed_build_keeps_nobody_out(forge, pictures, whole, tmp_path):
    build = begun(forge, pictures, tmp_path / "out")
    workers = [pid for pid in build.processes() if pid != build.pid]
    for worker in workers:
        os.kill(worker, signal.SIGSTOP)
    os.kill(build.pid, signal.SIGKILL)
    assert wait_until(lambda: not build.is_running(), 5)
    try:
        assert sorted(build.processes()) == sorted(workers)
        write_shards(pictures, tmp_path / "out", **SETTINGS)
    finally:
        for worker in workers:
            os.kill(worker, signal.SIGKILL)
    build.wait()
    assert contents(tmp_path / "out") == contents(whole)


@pytest.mark.parametrize("moment", ["first worker", "first shard"])
def test_ctrl_c_ends_a_build_at_once_without_a_traceback(moment, forge, pictures, whole, tmp_path):
    if moment == "first worker":
        build = Build(forge, pictures, tmp_path / "out")
        assert wait_until(lambda: len(build.processes()) > 1, 30)
    else:
        build = begun(forge, pictures, tmp_path / "out")
    os.killpg(build.pid, signal.SIGINT)  # as a terminal does: every process of the group
    assert build.wait(seconds=5) == "interrupted\n"
    assert not list(build.out.glob(".*.partial"))
    assert Build(forge, pictures, tmp_path / "out", workers=0).wait() == ""
    assert contents(tmp_path / "out") == contents(whole)


def test_ctrl_c_during_a_fork_ends_the_command_with_one_line(pictures, tmp_path):
    code = """
import os, signal, sys, time
from fastmae.train.cli.main import main

def interrupt():
    os.killpg(0, signal.SIGINT)
    time.sleep(0.1)  # until a thread has taken it

os.register_at_fork(before=interrupt)
sys.exit(main())
"""
    command = [sys.executable, "-c", code, "shards", "build", pictures, tmp_path / "out", "--workers", "2"]
    build = subprocess.run(command, start_new_session=True, capture_output=True, text=True, timeout=60)
    assert build.returncode == 130 and build.stdout == ""
    line = f"fastmae: {tmp_path}/out: interrupted; the same command continues from the finished shards"
    assert build.stderr.splitlines()[-1] == line
    assert "Traceback" not in build.stderr and "ignored" not in build.stderr


def test_a_second_build_is_refused_and_the_first_is_unharmed(forge, pictures, whole, tmp_path):
    build = begun(forge, pictures, tmp_path / "out")
    os.kill(build.pid, signal.SIGSTOP)  # it holds its lock meanwhile
    with pytest.raises(InputError, match=f"another build writes here, process {build.pid} on .*; wait for its end"):
        write_shards(pictures, tmp_path / "out", **SETTINGS)
    os.kill(build.pid, signal.SIGCONT)
    assert build.wait() == ""
    assert contents(tmp_path / "out") == contents(whole)


@pytest.mark.parametrize(("size", "ahead"), [(3000, 64), (10 << 20, 8)])
def test_few_images_wait_in_memory_and_large_ones_fewer(size, ahead, image_folder):
    sources = [source._replace(bytes=size) for source in list_images(image_folder).sources]
    taken = []

    def endless():
        for source in itertools.cycle(sources):
            taken.append(source)
            yield source

    with contextlib.closing(recode_all(endless(), Recode(resize=None), 1)) as images:
        results = [next(images) for _ in range(40)]
        assert [source for source, _ in results] == taken[:40] and len(taken) <= 40 + ahead
    assert all(data == source.path.read_bytes() for source, data in results)
