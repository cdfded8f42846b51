"""A cluster of small programs in the place of Slurm's, and what the launch examples do on it."""

import contextlib
import os
import stat
import subprocess
import sys
import time
from pathlib import Path

from fastmae.train.launch.__main__ import EXAMPLES
from tests.support.runs import losses, wait_for

# Starts as many tasks as FAKE_TASKS says, with the variables that Slurm gives them, passes SIGUSR1 on to each, as --signal
# does, and ends with the highest exit code of theirs, as srun does. FAKE_CODE ends it at once.
SRUN = """#!{python}
import os, signal, subprocess, sys
with open("srun.log", "a") as log:
    print(*sys.argv[1:], file=log)
if "FAKE_CODE" in os.environ:
    sys.exit(int(os.environ["FAKE_CODE"]))
command = sys.argv[1:]
while command[0].startswith("--"):
    del command[0]
count = int(os.environ.get("FAKE_TASKS", 2))
step = dict(SLURM_STEP_ID=0, SLURM_STEP_NUM_TASKS=count, SLURM_STEP_NODELIST="here", SLURM_STEP_TASKS_PER_NODE=count)
tasks = []
signal.signal(signal.SIGUSR1, lambda number, frame: [task.send_signal(number) for task in tasks])
for rank in range(count):
    place = dict(step, SLURM_PROCID=rank, SLURM_LOCALID=rank)
    tasks.append(subprocess.Popen(command, env={{**os.environ, **{{name: str(value) for name, value in place.items()}}}}))
codes = [task.wait() for task in tasks]
sys.exit(max(code if code >= 0 else 128 - code for code in codes))
"""
SCONTROL = """#!/bin/bash
echo "$@" >> scontrol.log
exit "${FAKE_SCONTROL:-0}"
"""
SBATCH = """#!/bin/bash
cp "$1" submitted.sbatch
echo Submitted batch job 4711
"""

# The variables of one task of a step of two on one machine.
STEP_OF_TWO = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_TASKS_PER_NODE": "2",
               "SLURM_STEP_NODELIST": "node1", "SLURM_JOB_ID": "7"}  # fmt: skip


def write_program(path, text):
    """A file that can be run."""
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def environment_in(folder: Path) -> dict[str, str]:
    """The environment of a job that finds srun, scontrol and sbatch, which are written to ``folder``."""
    programs = folder / "programs"
    programs.mkdir()
    write_program(programs / "srun", SRUN.format(python=sys.executable))
    write_program(programs / "scontrol", SCONTROL)
    write_program(programs / "sbatch", SBATCH)
    return {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "PYTHON": sys.executable, "OMP_NUM_THREADS": "1",
            "SLURM_JOB_ID": str(os.getpid()), "SLURM_CPUS_PER_TASK": "2", "SLURM_NTASKS": "2", "SLURM_PROCID": "0",
            "SLURM_LOCALID": "0"}  # fmt: skip


def start(example, flags, folder, environment):
    """The launch example of that name as a process that works in ``folder``."""
    return subprocess.Popen(["bash", EXAMPLES[example], *map(str, flags)], cwd=folder, env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip


def children_of(number):
    """The processes that process ``number`` has started, as /proc tells."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # ended meanwhile
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    return [child for child, parent in parents.items() if parent == int(number)]


def wait_for_a_step(run, process):
    """Until ``process`` has trained one, or has ended."""
    wait_for(run / "metrics.jsonl", process)
    while not losses(run) and process.poll() is None:
        time.sleep(0.01)


def log_of(folder, program):
    """A line for each time that one of the small programs was called."""
    path = folder / f"{program}.log"
    return path.read_text().splitlines() if path.exists() else []


def options_of(script):
    """What a script asks sbatch for."""
    return dict(
        line.removeprefix("#SBATCH --").partition("=")[::2] for line in script.splitlines() if line.startswith("#SBATCH ")
    )
