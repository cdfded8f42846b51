"""``python -m fastmae.train.launch.submit FLAGS -- FLAGS OF PRETRAIN``: a run on Slurm, or on this machine, through submitit.

submitit (``pip install 'fastmae[submitit]'``) signals all processes before the time limit and when Slurm preempts the job.
fastmae saves after the same step on all of them and returns 85; then the first process hands that signal on to submitit, whose
own handler counts the time-outs and requeues the job. Source: submitit's documentation, "Checkpointing".
"""

import dataclasses
import os
import signal
import sys
from pathlib import Path
from typing import Literal

import tyro

from fastmae.errors import InputError, RequeueError
from fastmae.optional import require
from fastmae.train.cli.main import main as fastmae_main
from fastmae.train.config.resumed import with_settings_of_run
from fastmae.train.config.run import optional
from fastmae.train.config.settings import PretrainSettings, switches

_SAVING = 120  # seconds between the signal and the time limit
_TASKS = ("--kill-on-bad-exit=0", "--wait=300")  # as in slurm.sbatch, which explains them


@dataclasses.dataclass(frozen=True, kw_only=True)
class Submission:
    """Submit a pretraining run. The flags of `fastmae pretrain` follow after --."""

    folder: Path
    """Folder for submitit's files and the output of all processes, on a file system that all nodes share."""
    nodes: int = 1
    """Number of nodes."""
    gpus: int = 8
    """GPUs per node, one process each."""
    processes: optional(int, "INT", "one per GPU") = None
    """Processes per node."""
    cpus: int = 12
    """Cores per process."""
    hours: float = 24
    """Time limit of each start of the job."""
    restarts: int = 50
    """Restarts after a time limit; those after a preemption are not counted."""
    partition: optional(str, "STR", "none") = None
    """Slurm's partition."""
    account: optional(str, "STR", "none") = None
    """Slurm's account."""
    qos: optional(str, "STR", "none") = None
    """Slurm's quality of service."""
    constraint: optional(str, "STR", "none") = None
    """Slurm's constraint on nodes."""
    cluster: optional(Literal["slurm", "local"], "{slurm,local}", "slurm if srun is installed, else local") = None
    """Slurm, or this machine."""
    wait: bool = False
    """Wait for the run to end; exit with 1 if it failed."""

    @property
    def tasks(self) -> int:
        """Processes per node."""
        return max(1, self.gpus) if self.processes is None else self.processes


class Pretraining:
    """A run, as submitit calls it in each process."""

    def __init__(self, flags: list[str]):
        self.flags = flags

    def __call__(self) -> None:
        """Pretrain. Raises RuntimeError with the exit code of a run that failed; its own message is in the output."""
        submitit = require("submitit", "submitting jobs", "'fastmae[submitit]'")
        environment = submitit.JobEnvironment()
        if environment.cluster != "slurm":  # Slurm's variables are read as they are
            submitit.helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
            os.environ["MASTER_ADDR"] = "127.0.0.1"
        number = getattr(signal, f"SIG{environment.USR_SIG}")
        requeue = signal.getsignal(number)
        code = fastmae_main(["pretrain", "--requeue-exit", *self.flags])
        if code == RequeueError.exit_code and environment.global_rank == 0:
            signal.signal(number, requeue)
            signal.raise_signal(number)  # does not return: the handler requeues and exits, or raises
        if code == RequeueError.exit_code:
            sys.exit(0)  # no result, which submitit would take for the run's
        if code:
            raise RuntimeError(f"fastmae pretrain ended with exit code {code}")

    def checkpoint(self):
        """What submitit starts when it has requeued the job: the same again, which resumes from the newest checkpoint."""
        return require("submitit", "submitting jobs").helpers.DelayedSubmission(self)

    __submitit_checkpoint__ = checkpoint  # its name in newer versions


def submit(submission: Submission, flags: list[str]):
    """Submit the run; return submitit's job. Raises InputError on flags that cannot be right, before they are queued."""
    submitit = require("submitit", "submitting jobs", "'fastmae[submitit]'")
    _check(submission)
    flags = switches(flags)
    settings = tyro.cli(tyro.conf.OmitArgPrefixes[PretrainSettings], prog="fastmae pretrain", args=flags)
    settings, _ = with_settings_of_run(settings, flags)
    settings.run()
    settings.resolve(world_size=submission.nodes * submission.tasks)
    executor = submitit.AutoExecutor(
        submission.folder,
        cluster=submission.cluster,
        slurm_max_num_timeout=submission.restarts,
        local_max_num_timeout=submission.restarts,
    )
    executor.update_parameters(
        name="fastmae",
        nodes=submission.nodes,
        tasks_per_node=submission.tasks,
        gpus_per_node=submission.gpus,
        cpus_per_task=submission.cpus,
        timeout_min=max(1, round(submission.hours * 60)),
        stderr_to_stdout=True,
        slurm_partition=submission.partition,
        slurm_account=submission.account,
        slurm_qos=submission.qos,
        slurm_constraint=submission.constraint,
        slurm_signal_delay_s=_SAVING,
        slurm_srun_args=[*_TASKS, f"--cpus-per-task={submission.cpus}"],
        slurm_additional_parameters={"requeue": True, "mem": 0},
    )
    if executor.cluster == "slurm":  # whether or not Slurm binds a task to its cores; a later --workers wins
        flags = ["--workers", str(max(1, submission.cpus - 1)), *flags]
    return executor.submit(Pretraining(flags))


def _check(submission: Submission) -> None:
    """Raises InputError. Not in ``__post_init__``, whose errors the argument parser would word."""
    numbers = (submission.nodes, submission.tasks, submission.cpus, submission.hours)
    if not all(number > 0 for number in numbers) or min(submission.gpus, submission.restarts) < 0:
        raise InputError(
            "nodes, processes, cpus and hours must be positive, gpus and restarts not negative, "
            f"got {', '.join(map(str, numbers))}, {submission.gpus} and {submission.restarts}"
        )
    if submission.cluster == "local" and submission.nodes > 1:
        raise InputError(f"the local cluster is one node, got {submission.nodes}")


def main(arguments: list[str] | None = None) -> int:
    """Submit from the command line. Returns the exit code: 0 done, 1 the run failed, 2 wrong input."""
    arguments = sys.argv[1:] if arguments is None else arguments
    middle = arguments.index("--") if "--" in arguments else len(arguments)
    try:
        submission = tyro.cli(Submission, prog="python -m fastmae.train.launch.submit", args=arguments[:middle])
        job = submit(submission, arguments[middle + 1 :])
    except InputError as error:
        print(f"fastmae: {error}", file=sys.stderr)
        return error.exit_code
    print(f"job {job.job_id}: {job.paths.stdout}", flush=True)
    if submission.wait and (error := job.exception()) is not None:
        print(f"fastmae: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    # By its own name, not as __main__: jobs import it.
    from fastmae.train.launch import submit as this

    sys.exit(this.main())
