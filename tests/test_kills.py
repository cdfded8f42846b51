"""kill -9 at random steps of real runs: each goes on by itself, to the bits of a run that nobody disturbed."""

import random
import signal

import pytest

from fastmae.train.checkpoint import list_checkpoints, verify
from tests.support.runs import FLAGS, assert_same_bits, finish, losses, records, start

STEPS = 26
SMALL = ["--blr", "0.01", "--steps", str(STEPS), "--save-every", "1", "--keep", "2"]
# The command line, of a model so small that a run takes a second, killed so many seconds after so many steps of its own.
PROGRAM = """
import os, signal, sys, threading, time
from fastmae.config import PRESETS
from fastmae.train.cli import main
from fastmae.train.log import RunLog

PRESETS["tiny"].update(embed_dim=24, depth=2, num_heads=3, decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2)
steps, seconds = int(os.environ.get("STEPS_TO_LIVE", -1)), float(os.environ.get("SECONDS_TO_LIVE", 0))
advance = RunLog.advance

def advance_then_die(self):
    global steps
    advance(self)
    steps -= 1
    if steps == 0:
        threading.Thread(target=lambda: (time.sleep(seconds), os.kill(os.getpid(), signal.SIGKILL)), daemon=True).start()

RunLog.advance = advance_then_die
sys.exit(main())
"""
KINDS = {
    "accumulated, saved beside training": (["--batch-size", "4", "--async-save"], 4),
    "fp16, saved beside training": (["--batch-size", "8", "--precision", "fp16"], 3),
    "fp16 and accumulated, saved between steps": (["--batch-size", "2", "--precision", "fp16", "--no-async-save"], 3),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_killed_at_random_steps_ends_with_the_bits_of_one_that_was_not(kind, shard_folder, tmp_path):
    options, kills = KINDS[kind]
    flags = ["--data", shard_folder, *FLAGS, *SMALL, *options]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    program = ("-c", PROGRAM)
    code, text = finish(start([*flags, "--out", whole], program=program))
    assert code == 0, text
    draw = random.Random(kind)
    for _ in range(kills):
        moment = {"STEPS_TO_LIVE": str(draw.randint(3, 6)), "SECONDS_TO_LIVE": str(draw.uniform(0, 0.05))}
        assert finish(start([*flags, "--out", killed], program=program, **moment))[0] == -signal.SIGKILL
    code, text = finish(start([*flags, "--out", killed], program=program))
    assert code == 0 and "resumed from" in text and "damaged" not in text, text
    last = f"step-{STEPS:07d}"
    assert_same_bits(whole / last, killed / last)
    # Not only those that counted in the end: every loss of every attempt.
    assert {(r["step"], r["loss"]) for r in records(killed) if "loss" in r} == set(losses(whole).items())
    assert len(losses(whole)) == STEPS and len(list_checkpoints(killed)) == 2
    for folder in list_checkpoints(killed):
        verify(folder)
    assert not [p.name for p in killed.iterdir() if p.name.startswith(".step")]
