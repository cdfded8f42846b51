"""kill -9 while a checkpoint is written: at every call to the file system, and at random moments; nothing needs a hand."""

import io
import itertools
import os
import random
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
import torch

from fastmae.train.checkpoint import find_checkpoint, list_checkpoints, verify
from tests.forked import context
from tests.runs import tensors_of
from tests.saves import save, saver_of, tensors_at

pytestmark = pytest.mark.slow

_CALLS = ("fsync", "mkdir", "rename", "replace", "unlink", "rmdir", "remove")


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A run's folder with the checkpoints of steps 1 and 2."""
    run = tmp_path_factory.mktemp("template")
    for step in (1, 2):
        save(saver_of(run), step)
    return run


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def save_and_die_at(run, number):
    """Save step 3, and be killed before the call ``number`` to the file system."""
    count = itertools.count(1)

    def before(call, is_counted=lambda *_: True):
        def counted(*arguments, **options):
            if is_counted(*arguments) and next(count) == number:
                die()
            return call(*arguments, **options)

        return counted

    for name in _CALLS:
        setattr(os, name, before(getattr(os, name)))
    io.open = before(io.open, lambda path, mode="r", *_: set(mode) & set("wax+"))
    save(saver_of(run, keep=2), 3)


def save_and_lose_at(run, number):
    """Save step 3, and be killed before the flush ``number``, of which the disk keeps the first half."""
    fsync, count = os.fsync, itertools.count(1)

    def lose(handle):
        path = Path(f"/proc/self/fd/{handle}").readlink()
        if path.is_file() and next(count) == number:
            os.truncate(path, path.stat().st_size // 2)
            die()
        fsync(handle)

    os.fsync = lose
    save(saver_of(run, keep=2), 3)


def save_and_die_after(run, seconds):
    """Save step 3 of some megabytes beside training, and be killed ``seconds`` after it began; or tell how long it took."""
    saver, tensors = saver_of(run, keep=2, asynchronous=True), {**tensors_at(3), "optimizer/big": torch.ones(2 << 20)}
    if seconds is not None:
        threading.Thread(target=lambda: (time.sleep(seconds), die()), daemon=True).start()
    began = time.perf_counter()
    save(saver, 3, tensors)
    saver.wait()
    if seconds is not None:
        time.sleep(60)
    (run / "seconds").write_text(str(time.perf_counter() - began))


def run_killed(target, *arguments) -> bool:
    """Whether the process was killed; it must not end in any other way but well."""
    process = context().Process(target=target, args=arguments)
    process.start()
    process.join(120)
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


def goes_on_by_itself(run, may_be_damaged=False) -> int:
    """The step that the next start continues from; its saves work, and leave nothing of the killed one."""
    found, damaged = find_checkpoint(run)
    assert damaged == [] or may_be_damaged
    step = int(found.name[-1])
    assert step in (2, 3) and tensors_of(found)["model/norm.weight"].tolist() == [float(step)] * 8
    save(saver_of(run, keep=2), 4)
    assert list_checkpoints(run)[0].name == "step-0000004"
    for folder in list_checkpoints(run):
        if not may_be_damaged or folder.name != "step-0000003":
            verify(folder)
    assert not [p.name for p in run.iterdir() if p.name.startswith(".")]
    return step


@pytest.mark.parametrize("scene", ["clean", "a damaged one of the same step"])
def test_a_save_killed_at_any_call_leaves_the_newest_complete_one(scene, template, tmp_path):
    steps = []
    for number in itertools.count(1):
        run = shutil.copytree(template, tmp_path / str(number))
        if scene != "clean":
            shutil.copytree(run / "step-0000002", run / "step-0000003")
            (run / "step-0000003" / "model.safetensors").write_bytes(b"")
        if not run_killed(save_and_die_at, run, number):
            break
        steps.append(goes_on_by_itself(run, may_be_damaged=scene != "clean"))
    assert steps == sorted(steps) and set(steps) == {2, 3} and len(steps) > 25


def test_a_save_that_loses_what_was_not_flushed_leaves_the_newest_complete_one(template, tmp_path):
    steps = []
    for number in itertools.count(1):
        run = shutil.copytree(template, tmp_path / str(number))
        if not run_killed(save_and_lose_at, run, number):
            break
        steps.append(goes_on_by_itself(run))
    assert steps == [2] * 6  # tensors, metadata twice, weights, state, manifest


def test_a_save_killed_at_random_moments_leaves_the_newest_complete_one(template, tmp_path):
    whole = shutil.copytree(template, tmp_path / "whole")
    assert not run_killed(save_and_die_after, whole, None)
    usual = float((whole / "seconds").read_text())
    draw, steps, unfinished = random.Random(0), [], 0
    for number in range(30):
        run = shutil.copytree(template, tmp_path / str(number))
        assert run_killed(save_and_die_after, run, draw.uniform(0, 1.5 * usual))
        unfinished += bool(list(run.glob(".step-*.partial")))
        steps.append(goes_on_by_itself(run))
    assert unfinished >= 5  # or it was not while it wrote
