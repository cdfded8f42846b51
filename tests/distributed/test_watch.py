"""The watch of one process, in processes of their own, because it ends them. Runs of several: ``test_survival.py``."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch

from fastmae.train import console
from fastmae.train.distributed import watch
from fastmae.train.distributed.watch import Watch
from fastmae.train.distributed.world import World
from tests.support import faults
from tests.support.crew import context, speak_into

FOREVER = 60


def begin(path, target, out):
    speak_into(path)
    watch._TICK = 0.2
    console.open_streams()
    target(Watch(World(0, 1, torch.device("cpu")), Path(out), first=FOREVER, later=1.0))


def end(target, folder, out=None, timeout=30):
    """Exit code and words of a process that calls ``target`` with a watch of one second's patience."""
    process = context().Process(target=begin, args=(folder / "console", target, out or folder))
    process.start()
    process.join(timeout)
    process.kill()
    assert process.exitcode is not None, (folder / "console").read_text()
    return process.exitcode, (folder / "console").read_text()


def hang(watched):
    watched.beat(7, "in a step")
    time.sleep(FOREVER)


def make_progress(watched):
    for step in range(6):
        watched.beat(step, "in a step")
        time.sleep(0.5)
    watched.end()


def be_slow_where_it_may(watched):
    watched.beat(0, "saving", slow=True)
    time.sleep(2.5)
    watched.end()


def hang_after_the_end(watched):
    watched.beat(7, "in a step")
    watched.end()
    time.sleep(2.5)


def hang_without_console(watched):
    os.close(2)
    hang(watched)


def hold_the_interpreter(watched):
    time.sleep(0.5)  # the watchdog waits for as long as the first step may take
    watched.beat(7, "in a step")
    faults.hold_interpreter()


def test_a_process_without_progress_writes_its_stacks_and_ends_with_four(tmp_path):
    code, text = end(hang, tmp_path)
    (path,) = (tmp_path / "hangs").glob("step-0000007-rank-0-process-*.txt")
    assert code == 4
    assert f"fastmae: rank 0: no progress for 1 s after step 7, in a step; the stacks of its threads are in {path}" in text
    assert "in hang" in text and "in hang" in path.read_text() and path.read_text().startswith("rank 0 on ")


@pytest.mark.parametrize("target", [make_progress, be_slow_where_it_may, hang_after_the_end])
def test_a_process_that_makes_progress_may_be_slow_or_has_ended_is_left_alone(target, tmp_path):
    assert end(target, tmp_path) == (0, "")


def test_stacks_that_cannot_be_written_are_on_the_console(tmp_path):
    (tmp_path / "hangs").write_text("a file in the way")
    code, text = end(hang, tmp_path)
    assert code == 4 and "in hang" in text
    assert "the stacks of its threads are above" in text


def test_a_process_without_a_console_ends_too(tmp_path):
    code, _ = end(hang_without_console, tmp_path)
    assert code == 4
    assert "in hang" in next((tmp_path / "hangs").glob("*.txt")).read_text()


def test_the_watchdog_ends_a_process_that_never_gives_python_back(tmp_path):
    """Even before the watch has looked for the first time after its patience became shorter."""
    began = time.monotonic()
    code, text = end(hold_the_interpreter, tmp_path)
    assert code == -signal.SIGKILL
    assert "in hold_the_interpreter" in text and "Python has not run in it for" in text
    assert time.monotonic() - began < 20
