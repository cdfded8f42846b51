"""The preflight check: all processes of a run join, and rank 0 reports what would make the run fail, or slow.

In the order of what each part needs: first what was gathered over gloo, then data and output, clocks, all-reduces, and the
batch. Lines are printed as they are found: a part that hangs is the one after the last line.
"""

import torch

from fastmae.errors import InputError
from fastmae.train.config.precision import AUTOCAST, precision_of
from fastmae.train.config.recipes import Recipe
from fastmae.train.config.run import Run
from fastmae.train.config.settings import DoctorSettings
from fastmae.train.distributed.join import join_world, leave_world
from fastmae.train.distributed.launcher import read_launcher
from fastmae.train.distributed.world import World
from fastmae.train.doctor.bandwidth import check_rates
from fastmae.train.doctor.clocks import compare_clocks
from fastmae.train.doctor.findings import Report, describe_groups, group_ranks, name_ranks
from fastmae.train.doctor.fit import check_fit, estimate_step
from fastmae.train.doctor.inventory import Inventory, machines_of, take_inventory
from fastmae.train.doctor.machine import FILES, SHARED
from fastmae.train.doctor.shared_paths import check_data, check_out, check_stage

_PATIENCE = 300.0  # seconds until all have joined, and for each thing that is gathered
_MUST_AGREE = ("fastmae", "torch", "nccl")  # what processes send each other depends on them
_USED = 0.9  # share of a GPU's memory that is free if no other process uses it


def preflight(settings: DoctorSettings) -> int:
    """Check the run of ``settings``, together with all other processes; the exit code, 2 if there are errors.

    Raises InputError on wrong settings, LostProcessError if not all processes join.
    """
    run = settings.run()
    recipe = settings.resolve(read_launcher().size) if settings.preset or settings.recipe else None
    # Over gloo, whatever devices there are: NCCL may be what does not work.
    world = join_world("cpu", min(run.first_timeout, _PATIENCE))
    errors = examine(world, run, recipe, has_data=settings.data is not None, has_out=settings.out is not None)
    if not errors:  # after some a thread may still wait for NCCL; the command line then ends the process as it is
        leave_world()
    return InputError.exit_code if errors else 0


def examine(world: World, run: Run, recipe: Recipe | None, *, has_data: bool, has_out: bool) -> int:
    """The report of all processes of ``world``, which has joined on the CPU; the number of errors, the same on each.

    ``recipe``: None where no model was given. ``has_data``, ``has_out``: whether those of ``run`` are checked.
    """
    report = Report(world)
    everyone = world.gather([take_inventory(world, run.device)])
    gpu = everyone[world.rank].gpu
    device = torch.device("cpu") if gpu is None else torch.device("cuda", gpu.index)
    machines = machines_of(everyone)
    compare(report, everyone, machines)
    estimate = (
        None
        if recipe is None
        else estimate_step(recipe.model, recipe.mask_ratio, AUTOCAST[precision_of(run.precision, device.type)])
    )
    if has_data:
        check_data(report, world, run.data, run.allow_pipe)
    if has_data and run.stage is not None:
        check_stage(report, world, everyone, run.data, run.stage)
    if has_out:
        check_out(report, world, everyone, run.out, estimate and estimate.parameters, run.keep)
    compare_clocks(report, world, machines)
    # Where one process has no GPU none can use its own: collectives would wait, and the run would not start anyway.
    can_compute = not any(one.gpu_error for one in everyone) and len({one.gpu is None for one in everyone}) == 1
    if can_compute:
        can_compute = check_rates(report, world, machines, device)
    if recipe is not None and can_compute:
        check_fit(report, world, run, recipe, device)
    report.line(f"errors: {report.errors}, warnings: {report.warnings}")
    return report.errors


def compare(report: Report, everyone: list[Inventory], machines: list[list[Inventory]]) -> None:
    """Report what each machine has, and what differs between the processes."""
    report.line(f"{_count(len(everyone), 'process', 'es')} on {_count(len(machines), 'machine', 's')}")
    for machine in machines:
        for gpu, ranks in group_ranks({one.rank: _describe(one) for one in machine}).items():
            report.line(f"  {machine[0].host}: {name_ranks(ranks)}, {gpu}")
        _check_limits(report, machine[0], [one.rank for one in machine])
    names = sorted({name for one in everyone for name in one.versions})
    same = []
    for name in names:
        found = {one.rank: one.versions.get(name, "missing") for one in everyone}
        if len(set(found.values())) == 1:
            same.append(f"{name} {found[0]}")
        elif name in _MUST_AGREE:
            report.error(f"{name} differs: {describe_groups(found)}; install the same version everywhere")
        else:
            report.warning(f"{name} differs: {describe_groups(found)}; install the same version everywhere")
    report.line(f"the same on all ranks: {', '.join(same)}")
    for name in sorted({name for one in everyone for name in one.variables}):
        found = {one.rank: one.variables.get(name, "unset") for one in everyone}
        if len(set(found.values())) > 1:
            report.warning(f"{name} differs: {describe_groups(found)}; set it the same for all ranks")
    _check_gpus(report, everyone)


def _count(number: int, noun: str, plural: str) -> str:
    return f"{number} {noun}{plural if number != 1 else ''}"


def _describe(one: Inventory) -> str:
    if one.gpu is None:
        return f"CPU, {one.cores} cores"
    modes = f", {one.gpu.modes}" if one.gpu.modes else ""
    return f"{one.gpu.name}, {one.gpu.total / 2**30:.1f} GiB{modes}"


def _check_limits(report: Report, one: Inventory, ranks: list[int]) -> None:
    """Check shared memory and open files of a machine."""
    where = f"{one.host} ({name_ranks(ranks)})"
    if one.shared is None:
        report.warning(f"{where}: /dev/shm is missing; NCCL and streams need it: mount a tmpfs there")
    elif one.shared[0] < SHARED:
        report.warning(
            f"{where}: /dev/shm has {one.shared[0] / 2**30:.1f} of {one.shared[1] / 2**30:.1f} GiB free, short for NCCL and "
            f"streams; give it {SHARED >> 30} GiB (docker: --shm-size {SHARED >> 30}g)"
        )
    if one.files[0] < FILES:
        report.warning(f"{where}: {one.files[0]} open files a process, {one.files[1]} at most; ulimit -n {FILES}")


def _check_gpus(report: Report, everyone: list[Inventory]) -> None:
    for reason, ranks in group_ranks({one.rank: one.gpu_error for one in everyone if one.gpu_error}).items():
        report.error(f"no GPU on {name_ranks(ranks)}: {reason}")
    gpus = {one.rank: one.gpu for one in everyone if one.gpu is not None}
    without = [one.rank for one in everyone if one.gpu is None and not one.gpu_error]
    if gpus and without:
        report.error(f"{name_ranks(without)} would train on the CPU, {name_ranks(gpus)} on GPUs; give --device for all")
    models = {rank: f"{gpu.name} with {gpu.total / 2**30:.0f} GiB" for rank, gpu in gpus.items()}
    if len(set(models.values())) > 1:
        report.warning(f"GPUs differ, the slowest and smallest decide: {describe_groups(models)}")
    for uuid, ranks in group_ranks({rank: gpu.uuid for rank, gpu in gpus.items() if gpu.uuid}).items():
        if len(ranks) > 1:
            report.error(
                f"{name_ranks(ranks)} share one GPU ({uuid}); start one process for each, or check CUDA_VISIBLE_DEVICES"
            )
    for rank, gpu in gpus.items():
        if gpu.free < _USED * gpu.total:
            report.warning(f"rank {rank}: {(gpu.total - gpu.free) / 2**30:.1f} GiB of its GPU are in use by another process")
