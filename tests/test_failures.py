"""One process of a run that fails by itself: no launcher is there to end the others."""

import os
import subprocess
import sys
import time

import pytest

from tests.support.runs import FLAGS, free_port

pytestmark = pytest.mark.cluster

# The command line, in which rank 1 fails in its third step.
FAILING = """
import os
import sys
from fastmae.train import cli
from fastmae.train.step import Step

plain, calls = Step.__call__, []


def fail(self, batches, lr):
    calls.append(lr)
    if len(calls) == 3 and os.environ["RANK"] == "1":
        raise AssertionError("the third step of rank 1")
    return plain(self, batches, lr)


Step.__call__ = fail
sys.exit(cli.main(sys.argv[1:]))
"""


def launch(arguments, folders, program=("-m", "fastmae.train")):
    """A process in each of ``folders``, all of one run; exit codes and what they have said, in the order of their ranks."""
    size = str(len(folders))
    place = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
             "OMP_NUM_THREADS": "1"}  # fmt: skip
    command = [sys.executable, *program, "pretrain", "tiny", *map(str, arguments)]
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=folder,
                         env={**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank, folder in enumerate(folders)
    ]  # fmt: skip
    try:
        return [(process.communicate(timeout=120)[0], process.returncode) for process in processes]
    finally:
        for process in processes:
            process.kill()


def test_a_process_that_fails_says_so_to_the_others_and_all_end(shard_folder, tmp_path):
    flags = ["--data", shard_folder, *FLAGS, "--steps", "8", "--batch-size", "4", "--out", tmp_path]
    began = time.monotonic()
    (said, code), (said_by_failed, code_of_failed) = launch(flags, [tmp_path, tmp_path], ("-c", FAILING))
    assert time.monotonic() - began < 60
    assert code_of_failed == 1 and "AssertionError: the third step of rank 1" in said_by_failed, said_by_failed
    assert code == 4 and "rank 1 has failed, AssertionError: the third step of rank 1" in said, said


def test_a_folder_that_machines_do_not_share_is_refused_by_all(shard_folder, tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
    flags = ["--data", shard_folder, *FLAGS, "--steps", "2", "--batch-size", "4", "--out", "run"]
    program = "from fastmae.train import cli, pretrain; import sys; pretrain._APPEARS = 3; sys.exit(cli.main(sys.argv[1:]))"
    for said, code in launch(flags, [tmp_path / "a", tmp_path / "b"], ("-c", program)):
        assert code == 2 and "fastmae: run: is not the same folder on " in said, said
    assert not list(tmp_path.rglob(".shared-*"))
