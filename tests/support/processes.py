"""Other processes: whether they live, and waiting for what they do."""

import time
from pathlib import Path


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.005)
    return condition()


def workers_of(source):
    """Pids of the workers behind a running iterator of a Loader."""
    return source.gi_frame.f_locals["batches"].gi_frame.f_locals["source"]._pool.pids
