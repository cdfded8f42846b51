"""kill -9 at random steps of real runs: each resumes by itself, bitwise equal to a run that nobody disturbed."""

import random
import signal
from functools import partial

import pytest

from fastmae.train.checkpoint.format import list_checkpoints, open_checkpoint
from tests.support import faults
from tests.support.crew import Crew, run
from tests.support.runs import assert_same_bits, losses, records

pytestmark = pytest.mark.cluster
MOST = 6  # steps before a kill
FLAGS = ["--blr", "0.01", "--save-every", "1", "--keep", "2"]
KINDS = {
    "accumulated, saved beside training": (["--batch-size", "4", "--async-save"], 4),
    "fp16, saved beside training": (["--precision", "fp16"], 3),
    "fp16 and accumulated, saved between steps": (["--batch-size", "3", "--precision", "fp16", "--no-async-save"], 3),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_killed_at_random_steps_ends_with_the_bits_of_one_that_was_not(kind, shard_folder, tmp_path):
    options, kills = KINDS[kind]
    steps, whole, killed = MOST * kills + 2, tmp_path / "whole", tmp_path / "killed"
    flags = [*FLAGS, "--steps", steps, *options]
    run(1, shard_folder, whole, *flags)
    draw = random.Random(kind)
    for _ in range(kills):
        fault = partial(faults.kill_after, draw.randint(3, MOST), draw.uniform(0, 0.05))
        with Crew(1, shard_folder, killed, *flags, fault=fault) as crew:
            assert crew.end() == [-signal.SIGKILL], crew.text()
    text = run(1, shard_folder, killed, *flags)
    assert "resumed from" in text and "damaged" not in text, text
    last = f"step-{steps:07d}"
    assert_same_bits(whole / last, killed / last)
    # Not only those that counted in the end: every loss of every attempt.
    assert {(r["step"], r["loss"]) for r in records(killed) if "loss" in r} == set(losses(whole).items())
    assert len(losses(whole)) == steps and len(list_checkpoints(killed)) == 2
    for folder in list_checkpoints(killed):
        open_checkpoint(folder)
    assert not [p.name for p in killed.iterdir() if p.name.startswith(".step")]
