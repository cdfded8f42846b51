"""A clock for timeouts that stops while the process is suspended: Slurm's SUSPEND, ``docker pause``, Ctrl-Z, a paused VM.

The system's clocks continue while a process is suspended, so that every deadline has passed once it resumes. This one is read
at least every ``LOOK`` seconds, and a longer interval between two reads counts as ``_MAX_INTERVAL``.
"""

import threading
import time

LOOK = 1.0
"""Most seconds between two reads while something is waited for."""
_MAX_INTERVAL = 2.0  # seconds; a busy machine may be late by as much


class RunClock:
    """Seconds in which this process could run, from 0; may be read by any thread."""

    def __init__(self):
        self._lock = threading.Lock()
        self._seconds, self._last = 0.0, time.monotonic()

    def read(self) -> float:
        """The seconds so far."""
        with self._lock:
            now = time.monotonic()
            self._seconds += min(now - self._last, _MAX_INTERVAL)
            self._last = now
            return self._seconds
