"""Whether a folder is the same one on all machines: a file that rank 0 makes must appear on every other."""

import socket
import time
import uuid
from pathlib import Path

from fastmae.errors import InputError
from fastmae.train.distributed.world import World

_APPEARS = 60.0  # seconds until a new file must be seen from every machine


def check_shared(out: Path, world: World) -> None:
    """Raise InputError, on every process, that names the machines on which ``out`` is another folder."""
    path, until = out / world.by_main(lambda: _mark(out)), time.monotonic() + _APPEARS
    while not path.exists() and time.monotonic() < until:
        list(out.iterdir())  # makes a network file system refresh
        time.sleep(0.1)
    others = sorted(set(world.gather([] if path.exists() else [socket.gethostname()])))
    if world.is_main:
        path.unlink(missing_ok=True)
    if others:
        raise InputError(f"{out}: is not the same folder on {', '.join(others[:8])}; give an --out that all machines share")


def _mark(out: Path) -> str:
    """Make a file in ``out`` that is nowhere else; return its name."""
    path = out / f".shared-{uuid.uuid4().hex}"
    path.touch()
    return path.name
