"""What differs between the processes of a run, and what their machines are short of."""

from fastmae.train.doctor.findings import Report, describe_groups, group_ranks, name_ranks
from fastmae.train.doctor.inventory import Inventory
from fastmae.train.doctor.machine import FILES, SHARED

_MUST_AGREE = ("fastmae", "torch", "nccl")  # what processes send each other is theirs
_USED = 0.9  # share of a GPU's memory that is free where nobody else computes


def compare(report: Report, everyone: list[Inventory], machines: list[list[Inventory]]) -> None:
    """What each machine has, and what differs."""
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
            report.error(f"{name} differs: {describe_groups(found)}; install the same one everywhere")
        else:
            report.warning(f"{name} differs: {describe_groups(found)}; install the same one everywhere")
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
    """Shared memory and open files of a machine."""
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
    lacking = [one.rank for one in everyone if one.gpu is None and not one.gpu_error]
    if gpus and lacking:
        report.error(f"{name_ranks(lacking)} would train on the CPU, {name_ranks(gpus)} on GPUs; give --device for all")
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
