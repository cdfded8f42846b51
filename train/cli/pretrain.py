"""``fastmae pretrain``, and ``fastmae doctor``, which takes the same settings."""

import functools
from collections.abc import Callable

import tyro

from fastmae.errors import InputError
from fastmae.train.config.resumed import with_settings_of_run
from fastmae.train.config.settings import DoctorSettings, PretrainSettings
from fastmae.train.distributed.launcher import read_launcher


def pretrain(settings: tyro.conf.OmitArgPrefixes[PretrainSettings]) -> None:
    """Pretrain a masked autoencoder on shards."""
    run = settings.run()
    from fastmae.train.pretrain.pretrain import pretrain as run_pretraining

    run_pretraining(settings.resolve(world_size=read_launcher().size), run)


def doctor(settings: tyro.conf.OmitArgPrefixes[DoctorSettings]) -> int:
    """Print versions, devices, and which kernels and attention are used and why not faster ones; under a launcher, or with a
    run's own flags, what would make that run fail."""
    launched = read_launcher()
    if settings.distributed and launched.launcher == "none":
        raise InputError(
            "--distributed looks at the processes of a launcher, and none has started this one: torchrun --nproc-per-node 8 -m "
            "fastmae.train doctor, or srun, with the flags of the run; docs/launch.md shows how on several machines"
        )
    if launched.size == 1 and not settings.distributed:
        from fastmae.train.doctor.machine import report as describe_machine

        print("\n".join(describe_machine()))
        if not settings.is_of_run:
            return 0
    from fastmae.train.doctor.preflight import preflight

    return preflight(settings)


def of_resumed_run(command: Callable, arguments: list[str]) -> Callable:
    """``command``, which takes settings, with those of the run that it resumes where ``arguments`` give none."""

    @functools.wraps(command)
    def run(settings):
        settings, path = with_settings_of_run(settings, arguments)
        if path is not None and read_launcher().rank == 0:
            print(f"settings that are not given are the run's own, {path}")
        return command(settings)

    return run
