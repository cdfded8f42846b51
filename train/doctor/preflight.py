"""A look before the start: all processes of a run meet, and rank 0 reports what would make the run fail, or slow.

In the order of what each part needs: first what was gathered over gloo, then data and output, clocks, all-reduces, and the
batch. Lines come as they are found, so that a part that hangs is the one after the last line.
"""

import statistics

import torch

from fastmae.errors import InputError
from fastmae.train.config.precision import AUTOCAST, precision_of
from fastmae.train.config.recipes import Recipe
from fastmae.train.config.run import Run
from fastmae.train.config.settings import DoctorSettings
from fastmae.train.distributed.join import join_world, leave_world
from fastmae.train.distributed.launcher import read_launcher
from fastmae.train.distributed.world import World
from fastmae.train.doctor.bandwidth import Rate, kinds_of, measure_rates
from fastmae.train.doctor.clocks import clock_offsets
from fastmae.train.doctor.comparison import compare
from fastmae.train.doctor.estimate import estimate_step
from fastmae.train.doctor.findings import Report, name_ranks
from fastmae.train.doctor.fit import check_fit
from fastmae.train.doctor.inventory import Inventory, machines_of, take_inventory
from fastmae.train.doctor.shared_paths import check_data, check_out, check_stage

_CLOCKS = 0.5  # seconds from which on lines of several machines cannot be put in order
_PATIENCE = 300.0  # seconds until all have come, and for each thing that is gathered
_SLOW = 0.5  # of the median rate of groups of one kind


def preflight(settings: DoctorSettings) -> int:
    """The look of this process at the run of ``settings``, together with all others; the exit code, 2 if there are errors.

    Raises InputError on wrong settings, LostProcessError if not all processes come.
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

    ``recipe``: None where no model was given. ``has_data``, ``has_out``: whether those of ``run`` are to be looked at.
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
    _compare_clocks(report, world, machines)
    # Where one process has no GPU none can use its own: collectives would wait, and the run does not start anyway.
    can_compute = not any(one.gpu_error for one in everyone) and len({one.gpu is None for one in everyone}) == 1
    if can_compute:
        can_compute = _measure(report, world, machines, device)
    if recipe is not None and can_compute:
        check_fit(report, world, run, recipe, device)
    report.line(f"errors: {report.errors}, warnings: {report.warnings}")
    return report.errors


def _compare_clocks(report: Report, world: World, machines: list[list[Inventory]]) -> None:
    offsets = clock_offsets(world, [machine[0].rank for machine in machines])
    for offset in offsets:
        if abs(offset.seconds) - offset.uncertainty > _CLOCKS:
            host = next(machine[0].host for machine in machines if machine[0].rank == offset.rank)
            report.warning(
                f"clock of {host} (rank {offset.rank}): {offset.seconds:+.3f} s from rank 0's, +- {offset.uncertainty:.3f} s; "
                "start an NTP client (chronyd) there"
            )
    if offsets:
        furthest = max(offsets, key=lambda offset: abs(offset.seconds))
        report.line(f"clocks: at most {furthest.seconds:+.4f} s from rank 0's, +- {furthest.uncertainty:.4f} s")


def _measure(report: Report, world: World, machines: list[list[Inventory]], device: torch.device) -> bool:
    """All-reduces; whether they work."""
    network = "NCCL" if device.type == "cuda" else "gloo"
    for kind, groups in kinds_of([[one.rank for one in machine] for machine in machines]).items() if world.size > 1 else ():
        rates = measure_rates(world, device, groups)
        failed = [rate for rate in rates if rate.error]
        for rate in failed:
            debug = "NCCL_DEBUG=INFO shows why" if network == "NCCL" else "check the network between the machines"
            report.error(f"all-reduce {kind} ({network}) fails on {name_ranks(rate.ranks)}: {rate.error}; {debug}")
        if failed:
            return False
        report.line(_describe_rates(kind, network, rates))
        median = statistics.median(rate.bus for rate in rates)
        for rate in rates:
            if rate.bus < _SLOW * median:
                report.warning(
                    f"all-reduce {kind}: {name_ranks(rate.ranks)} at {rate.bus:.2f} GB/s, the median is {median:.2f}; look for "
                    "a slow link or GPU there"
                )
    return True


def _describe_rates(kind: str, network: str, rates: list[Rate]) -> str:
    slowest = min(rates, key=lambda rate: rate.bus)
    which = f", the slowest of {len(rates)} groups at once ({name_ranks(slowest.ranks)})" if len(rates) > 1 else ""
    return (
        f"all-reduce {kind} ({network}, {slowest.bytes >> 20} MiB, {len(slowest.ranks)} ranks, median): "
        f"{slowest.algorithm:.2f} GB/s, bus {slowest.bus:.2f} GB/s{which}"
    )
