"""The launch examples, run for real as far as one machine can: with small programs instead of Slurm's."""

import os
import shlex
import signal
import subprocess

import pytest
import yaml

from fastmae.train.launch.__main__ import EXAMPLES
from fastmae.train.launch.__main__ import main as list_examples
from tests.support.runs import FLAGS, finish, losses
from tests.support.slurm import children_of, log_of, options_of, start, wait_for_a_step, write_program

# What can be read without running it.


def test_every_example_says_how_it_is_used_and_can_be_found(capsys):
    assert sorted(EXAMPLES) == ["kubernetes-pytorchjob.yaml", "kubernetes-trainjob.yaml", "slurm.sbatch", "torchrun.sh"]
    assert list_examples([]) == 0
    listed = capsys.readouterr().out
    for name, path in EXAMPLES.items():
        head = next(line for line in path.read_text().splitlines() if not line.startswith("#!"))
        assert head.startswith("# fastmae ") and head in listed and "CHANGE" in path.read_text()
        assert list_examples([name]) == 0 and capsys.readouterr().out == f"{path}\n"
    assert list_examples(["pbs.sh"]) == 2 and "got pbs.sh" in capsys.readouterr().err


@pytest.mark.parametrize("name", [name for name in EXAMPLES if not name.endswith(".yaml")])
def test_shell_examples_are_valid_shell(name):
    subprocess.run(["bash", "-n", EXAMPLES[name]], check=True)


def test_the_slurm_example_asks_for_a_signal_to_all_tasks_and_for_requeueing():
    options = options_of(EXAMPLES["slurm.sbatch"].read_text())
    assert options["signal"] == "USR1@120"  # no B:, which would signal the script alone
    assert "requeue" in options and options["open-mode"] == "append"
    assert options["ntasks-per-node"] == options["gpus-per-node"] == "8"


def documents(name):
    return {document["kind"]: document for document in yaml.safe_load_all(EXAMPLES[name].read_text())}


def check_pod(pod, container, command):
    """A pod that can run and save: memory for NCCL, claims for data and run, and more time to end than torchrun takes."""
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
    assert all("persistentVolumeClaim" in volumes[mounts[path]] for path in ("/data", "/run"))
    saving = next(int(item["value"]) for item in command["env"] if item["name"] == "PET_SHUTDOWN_TIMEOUT")
    assert pod["terminationGracePeriodSeconds"] > saving
    line = [*command["command"], *command["args"]]
    assert line[:5] == ["python", "-m", "torch.distributed.run", "-m", "fastmae.train"]
    # Without it a run that was stopped ends with 0, and the operator takes it for done.
    assert "--requeue-exit" in line
    assert [line[line.index(flag) + 1] for flag in ("--data", "--out")] == ["/data", "/run"]
    assert all(isinstance(item["value"], str) for item in command["env"])


def test_the_pytorchjob_restarts_what_a_preemption_stopped():
    spec = documents("kubernetes-pytorchjob.yaml")["PyTorchJob"]["spec"]
    worker = spec["pytorchReplicaSpecs"]["Worker"]
    pod = worker["template"]["spec"]
    container = pod["containers"][0]
    check_pod(pod, container, container)
    assert container["name"] == "pytorch"  # the operator looks for it
    assert worker["restartPolicy"] == "OnFailure" and spec["runPolicy"]["backoffLimit"] > 0
    assert spec["elasticPolicy"]["minReplicas"] == spec["elasticPolicy"]["maxReplicas"] == worker["replicas"]
    assert spec["nprocPerNode"] == str(container["resources"]["limits"]["nvidia.com/gpu"])


def test_the_trainjob_restarts_all_pods_together():
    both = documents("kubernetes-trainjob.yaml")
    runtime, job = both["TrainingRuntime"], both["TrainJob"]
    assert {document["apiVersion"] for document in both.values()} == {"trainer.kubeflow.org/v1alpha1"}
    assert job["spec"]["runtimeRef"] == {
        "apiGroup": "trainer.kubeflow.org", "kind": "TrainingRuntime", "name": runtime["metadata"]["name"]
    }  # fmt: skip
    jobset = runtime["spec"]["template"]["spec"]
    node = jobset["replicatedJobs"][0]
    assert node["name"] == node["template"]["spec"]["template"]["spec"]["containers"][0]["name"] == "node"
    assert node["template"]["metadata"]["labels"] == {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
    assert jobset["failurePolicy"]["maxRestarts"] > 0 and node["template"]["spec"]["backoffLimit"] == 0
    pod = node["template"]["spec"]["template"]["spec"]
    assert pod["restartPolicy"] == "Never"
    check_pod(pod, pod["containers"][0], job["spec"]["trainer"])


# The Slurm script.


def test_exit_code_85_requeues_the_job(cluster):
    folder, environment = cluster
    code, text = finish(start("slurm.sbatch", ["base"], folder, {**environment, "FAKE_CODE": "85"}))
    assert code == 0 and "resumes in the next start" in text
    assert log_of(folder, "scontrol") == [f"requeue {environment['SLURM_JOB_ID']}"]


@pytest.mark.parametrize("number", [0, 1, 2, 3, 4, 5, 130, 137, 143])
def test_other_exit_codes_are_final(cluster, number):
    folder, environment = cluster
    code, _ = finish(start("slurm.sbatch", ["base"], folder, {**environment, "FAKE_CODE": str(number)}))
    assert code == number and log_of(folder, "scontrol") == []


def test_restarts_are_limited(cluster):
    folder, environment = cluster
    limits = {"FAKE_CODE": "85", "SLURM_RESTART_COUNT": "3", "MAX_RESTARTS": "3"}
    code, text = finish(start("slurm.sbatch", ["base"], folder, {**environment, **limits}))
    assert code == 85 and "has started again 3 times" in text and log_of(folder, "scontrol") == []
    code, _ = finish(start("slurm.sbatch", ["base"], folder, {**environment, **limits, "SLURM_RESTART_COUNT": "2"}))
    assert code == 0 and len(log_of(folder, "scontrol")) == 1


def test_a_job_that_cannot_be_requeued_fails(cluster):
    folder, environment = cluster
    code, _ = finish(start("slurm.sbatch", ["base"], folder, {**environment, "FAKE_CODE": "85", "FAKE_SCONTROL": "1"}))
    assert code == 85


def test_flags_reach_every_task_as_they_were_given(cluster):
    folder, environment = cluster
    finish(start("slurm.sbatch", ["base", "--data", "a b", "--workers", "3"], folder, {**environment, "FAKE_CODE": "0"}))
    (line,) = log_of(folder, "srun")
    assert line.startswith("--kill-on-bad-exit=0 --wait=") and "--cpus-per-task=2" in line
    assert line.endswith("-m fastmae.train pretrain --requeue-exit --workers 1 base --data a b --workers 3")


@pytest.mark.cluster
def test_a_run_of_two_slurm_tasks_completes(cluster, shard_folder):
    folder, environment = cluster
    flags = ["tiny", "--data", shard_folder, *FLAGS, "--batch-size", "4", "--steps", "3", "--out", folder / "run"]
    code, text = finish(start("slurm.sbatch", flags, folder, environment))
    assert code == 0, text
    assert "effective batch = 4 per process x 2 processes x 1 accumulated = 8" in text
    assert len(losses(folder / "run")) == 3 and log_of(folder, "scontrol") == []


@pytest.mark.cluster
def test_a_run_that_slurm_signals_saves_is_requeued_and_goes_on(cluster, shard_folder):
    folder, environment = cluster
    flags = ["tiny", "--data", shard_folder, *FLAGS, "--batch-size", "4", "--steps", "30", "--out", folder / "run"]
    process = start("slurm.sbatch", [*flags, "--save-every", "1000"], folder, environment)
    wait_for_a_step(folder / "run", process)
    (srun,) = children_of(process.pid)
    os.kill(srun, signal.SIGUSR1)
    code, text = finish(process)
    assert code == 0 and "stopped by SIGUSR1" in text, text
    assert log_of(folder, "scontrol") == [f"requeue {environment['SLURM_JOB_ID']}"]
    code, text = finish(start("slurm.sbatch", flags, folder, {**environment, "SLURM_RESTART_COUNT": "1"}))
    assert code == 0 and "resumed from" in text, text
    assert len(losses(folder / "run")) == 30


# torchrun.


@pytest.mark.cluster
def test_torchrun_on_one_machine_completes(cluster, shard_folder):
    folder, environment = cluster
    flags = ["tiny", "--data", shard_folder, *FLAGS, "--batch-size", "4", "--steps", "2", "--out", folder / "run"]
    code, text = finish(start("torchrun.sh", flags, folder, {**environment, "NPROC": "2"}))
    assert code == 0 and "4 per process x 2 processes" in text, text


def test_torchrun_on_several_machines_needs_one_of_their_names(cluster):
    folder, environment = cluster
    environment = {name: value for name, value in environment.items() if name != "HEAD"}
    code, text = finish(start("torchrun.sh", ["tiny"], folder, {**environment, "NNODES": "2"}))
    assert code != 0 and "HEAD: is not set: the name of one of the machines" in text


def test_torchrun_gets_what_the_example_says(cluster):
    folder, environment = cluster
    write_program(folder / "python", '#!/bin/bash\nprintf "%s\\n" "$@" "$PET_SIGNALS_TO_HANDLE"\n')
    several = {"PYTHON": str(folder / "python"), "NNODES": "4", "HEAD": "node001", "JOB": "run-7", "NPROC": "8"}
    code, text = finish(start("torchrun.sh", ["base", "--out", "a b"], folder, {**environment, **several}))
    assert code == 0
    line, signals = text.splitlines()[:-1], text.splitlines()[-1]
    assert shlex.join(line) == (
        "-m torch.distributed.run --nnodes 4 --rdzv-backend c10d --rdzv-id run-7 --rdzv-endpoint node001:29400 "
        "--nproc-per-node 8 --max-restarts 3 --monitor-interval 1 -m fastmae.train pretrain base --out 'a b'"
    )
    assert {"SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2"} <= set(signals.split(","))
