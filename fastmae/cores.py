"""How many CPU cores this process may use: its affinity mask, and the CPU quota of its container.

``docker --cpus 2``, Kubernetes limits and systemd's ``CPUQuota`` do not change the affinity mask but set a quota: microseconds
of CPU time in each period, for a cgroup and those below it. Processes beyond the quota are stopped until the next period.
Sources: the kernel's "Control Group v2", section "CPU Interface Files" (``cpu.max``), and "CFS Bandwidth Control"
(``cpu.cfs_quota_us``, ``cpu.cfs_period_us``).
"""

import math
import os
from pathlib import Path

from fastmae.cgroups import folders

_V1 = ("sys/fs/cgroup/cpu", "sys/fs/cgroup/cpu,cpuacct")


def affinity_cores() -> int:
    """Cores of the affinity mask, at least 1."""
    return max(1, len(os.sched_getaffinity(0)))


def usable_cores() -> int:
    """Cores by affinity, or by quota if that is less, rounded up."""
    quota = cpu_quota()
    return affinity_cores() if quota is None else max(1, min(affinity_cores(), math.ceil(quota)))


def cpu_quota(root: Path = Path("/")) -> float | None:
    """The smallest quota, in cores, of this process's cgroups and those above them; None without one.

    ``root``: where ``proc`` and ``sys`` are.
    """
    return min((quota for folder in folders(root, "cpu", _V1) if (quota := _quota(folder)) is not None), default=None)


def _quota(folder: Path) -> float | None:
    """The quota that ``folder`` itself sets, in cores."""
    quota, period = _numbers(folder / "cpu.max")
    if quota is None:
        quota, period = *_numbers(folder / "cpu.cfs_quota_us")[:1], *_numbers(folder / "cpu.cfs_period_us")[:1]
    return quota / period if quota and period and quota > 0 and period > 0 else None


def _numbers(path: Path) -> tuple[int | None, int | None]:
    """The first two fields of a file, None for those that are not numbers, such as "max"."""
    try:
        fields = path.read_text().split()
    except (OSError, ValueError):
        fields = []
    numbers = [int(text) if text.removeprefix("-").isdecimal() else None for text in fields[:2]]
    return tuple([*numbers, None, None][:2])
