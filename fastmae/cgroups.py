"""The cgroups of this process and those above, where limits of CPU time and memory may be set.

Sources: cgroups(7), ``/proc/PID/cgroup``; the kernel's "Control Group v2", section "Organizing Processes and Threads".
"""

from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

V2 = ("sys/fs/cgroup", "sys/fs/cgroup/unified")
"""Where version 2 is mounted: alone, or beside version 1."""


def folders(root: Path, controller: str, v1: Sequence[str]) -> Iterator[Path]:
    """Folders of the files of ``controller``, which version 1 mounts at one of ``v1``, from this process's group upwards.

    ``root``: the folder of ``proc`` and ``sys``. In a container the paths may be the host's, and only their beginnings exist.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text(errors="surrogateescape").splitlines()
    except OSError:  # no Linux, or no /proc
        return
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        mounts = V2 if number == "0" and not controllers else v1 if controller in controllers.split(",") else ()
        for mount in mounts:
            for part in (own := PurePosixPath(path.lstrip("/")), *own.parents):
                yield root / mount / part
