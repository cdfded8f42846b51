"""kill -9 while a checkpoint is written: at every call to the file system, and at random moments; nothing needs a hand."""

import itertools
import random
import shutil
import signal

import pytest

from fastmae.train.checkpoint.format import list_checkpoints, open_checkpoint
from tests.support.forked import context
from tests.support.killed_saves import save_and_die_after, save_and_die_at, save_and_lose_at
from tests.support.runs import tensors_of
from tests.support.saves import found_in, save, saver_of


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A run's folder with the checkpoints of steps 1 and 2."""
    run = tmp_path_factory.mktemp("template")
    for step in (1, 2):
        save(saver_of(run), step)
    return run


def run_killed(target, *arguments) -> bool:
    """Whether the process was killed; it must not end in any other way but well."""
    process = context().Process(target=target, args=arguments)
    process.start()
    process.join(120)
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


def goes_on_by_itself(run, may_be_damaged=False) -> int:
    """The step that the next start continues from; its saves work, and leave nothing of the killed one."""
    found, damaged = found_in(run)
    assert damaged == [] or may_be_damaged
    step = int(found.name[-1])
    assert step in (2, 3) and tensors_of(found)["model/norm.weight"].tolist() == [float(step)] * 8
    save(saver_of(run, keep=2), 4)
    assert list_checkpoints(run)[0].name == "step-0000004"
    for folder in list_checkpoints(run):
        if not may_be_damaged or folder.name != "step-0000003":
            open_checkpoint(folder)
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
