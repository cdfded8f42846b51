"""How much memory is available on this machine, or in the container of this process.

Sources: proc_meminfo(5), ``MemAvailable``; the kernel's "Control Group v2", section "Memory Interface Files"
(``memory.max``, ``memory.current``, ``inactive_file`` of ``memory.stat``, which the kernel can reclaim), and "Memory Resource
Controller" for version 1.
"""

import re
from pathlib import Path

from fastmae.cgroups import folders

_V1 = ("sys/fs/cgroup/memory",)


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes, the least of what the machine and each cgroup of this process have left; None if unknown.

    ``root``: where ``proc`` and ``sys`` are.
    """
    known = [_machine(root), *(_cgroup(folder) for folder in folders(root, "memory", _V1))]
    return min((max(0, left) for left in known if left is not None), default=None)


def _machine(root: Path) -> int | None:
    found = re.search(r"^MemAvailable:\s+(\d+) kB", _text(root / "proc/meminfo"), re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def _cgroup(folder: Path) -> int | None:
    """What ``folder`` itself has left; None without a limit."""
    for limit_name, used_name, cache in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        limit, used = _text(folder / limit_name).strip(), _text(folder / used_name).strip()
        if limit.isdecimal() and used.isdecimal():
            found = re.search(rf"^{cache} (\d+)$", _text(folder / "memory.stat"), re.MULTILINE)
            return int(limit) - int(used) + (int(found[1]) if found else 0)
    return None


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
