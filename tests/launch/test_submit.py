"""Jobs through submitit, on this machine and handed to what stands for Slurm."""

import os
import shlex
import signal
import subprocess
import sys

import pytest

from fastmae.train.config.resumed import write_settings
from fastmae.train.config.run import Run
from fastmae.train.config.settings import PretrainSettings
from fastmae.train.launch import submit
from tests.support.runs import FLAGS, finish, losses
from tests.support.slurm import children_of, options_of, wait_for_a_step


def submitted(arguments, folder, environment=None):
    command = [sys.executable, "-m", "fastmae.train.launch.submit", *map(str, arguments)]
    return subprocess.Popen(command, cwd=folder, env=environment or {**os.environ, "OMP_NUM_THREADS": "1"}, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nodes", "0", "--", "base", "--data", "d", "--out", "o"], "nodes, processes, cpus and hours must be positive"),
        (["--hours", "nan", "--", "base", "--data", "d", "--out", "o"], "hours must be positive"),
        (
            ["--cluster", "local", "--nodes", "2", "--", "base", "--data", "d", "--out", "o"],
            "the local cluster is one node, got 2",
        ),
        (["--cluster", "local", "--", "--data", "d", "--out", "o"], "give a preset"),
        (["--cluster", "local", "--", "base", "--data", "d", "--out", "o", "--mask-ratio", "2"], "mask"),
    ],
)
def test_wrong_flags_are_refused_before_they_wait_in_a_queue(tmp_path, capsys, arguments, message):
    pytest.importorskip("submitit", reason="needs the extra `submitit`")
    assert submit.main(["--folder", str(tmp_path / "jobs"), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "jobs").exists()


def test_a_run_that_is_resumed_knows_its_own_settings_here_too(tmp_path, capsys):
    pytest.importorskip("submitit", reason="needs the extra `submitit`")
    (tmp_path / "run" / "step-0000001").mkdir(parents=True)
    recipe = PretrainSettings(preset="tiny", out=tmp_path / "run").resolve(world_size=8)
    write_settings(recipe, Run(data="shards", out=tmp_path / "run"))
    flags = ["--cluster", "local", "--", "--out", str(tmp_path / "run"), "--mask-ratio", "2"]  # the one that is wrong
    assert submit.main(["--folder", str(tmp_path / "jobs"), *flags]) == 2
    assert "mask" in capsys.readouterr().err


def test_submitit_asks_slurm_for_the_same_as_the_example(cluster, shard_folder):
    helpers = pytest.importorskip("submitit.helpers", reason="needs the extra `submitit`")
    folder, environment = cluster
    arguments = ["--folder", folder / "jobs", "--nodes", "2", "--hours", "1.5", "--partition", "gpu", "--cluster", "slurm",
                 "--", "base", "--data", shard_folder, "--out", folder / "run"]  # fmt: skip
    code, text = finish(submitted(arguments, folder, environment))
    assert code == 0 and "job 4711: " in text, text
    script = (folder / "submitted.sbatch").read_text()
    options = options_of(script)
    asked = {
        "nodes": "2",
        "ntasks-per-node": "8",
        "gpus-per-node": "8",
        "cpus-per-task": "12",
        "time": "90",
        "partition": "gpu",
    }
    assert {name: options[name] for name in asked} == asked
    assert (
        options["signal"] == "USR2@120" and "requeue" in options and options["open-mode"] == "append" and options["mem"] == "0"
    )
    assert "--kill-on-bad-exit=0 --wait=300 --cpus-per-task=12" in script
    assert "--workers 11 base --data" in shlex.join(
        helpers.DelayedSubmission.load(folder / "jobs" / "4711_submitted.pkl").function.flags
    )


LOCAL = ["--cluster", "local", "--gpus", "0", "--hours", "0.05", "--wait"]


@pytest.mark.cluster
def test_submitit_runs_two_processes_and_requeues_them(tmp_path, shard_folder):
    """The signal that submitit sends before a time limit, sent by hand: both save, the first one requeues, both resume."""
    pytest.importorskip("submitit", reason="needs the extra `submitit`")
    flags = ["tiny", "--data", shard_folder, *FLAGS, "--batch-size", "4", "--steps", "30", "--out", tmp_path / "run"]
    arguments = ["--folder", tmp_path / "jobs", *LOCAL, "--processes", "2", "--", *flags, "--save-every", "1000"]
    process = submitted(arguments, tmp_path)
    wait_for_a_step(tmp_path / "run", process)
    controller = process.stdout.readline().removeprefix("job ").partition(":")[0]
    for task in children_of(controller):
        os.kill(task, signal.SIGUSR2)
    code, text = finish(process)
    output = "\n".join(path.read_text() for path in (tmp_path / "jobs").glob("*.out"))
    assert code == 0, text + output
    assert "4 per process x 2 processes" in output
    assert "stopped by SIGUSR2" in output and "Requeued job" in output and "resumed from" in output, output
    assert len(losses(tmp_path / "run")) == 30


@pytest.mark.cluster
def test_a_run_that_fails_fails_its_submitit_job(tmp_path):
    pytest.importorskip("submitit", reason="needs the extra `submitit`")
    flags = ["tiny", "--data", tmp_path / "nothing", "--out", tmp_path / "run", "--device", "cpu"]
    code, text = finish(submitted(["--folder", tmp_path / "jobs", *LOCAL, "--", *flags], tmp_path))
    assert code == 1 and "fastmae pretrain ended with exit code 2" in text, text
