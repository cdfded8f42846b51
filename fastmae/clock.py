"""A clock for waiting that stands still while the process is suspended: Slurm's SUSPEND, ``docker pause``, Ctrl-Z, a paused VM.

The system's clocks go on while a process is stopped, so that every deadline has passed once it continues. Here a time between
two reads that is longer than whoever waits would have let pass counts as ``_MOST`` seconds.
"""

import threading
import time

LOOK = 1.0
"""Most seconds between two reads by whoever waits."""
_MOST = 2.0  # seconds that a longer time between two reads counts: a busy machine may be late by as much


class RunClock:
    """Seconds in which this process could run, from 0; to be read at least every ``LOOK`` seconds, by any thread."""

    def __init__(self):
        self._lock = threading.Lock()
        self._seconds, self._last = 0.0, time.monotonic()

    def read(self) -> float:
        """The seconds so far."""
        with self._lock:
            now = time.monotonic()
            self._seconds += min(now - self._last, _MOST)
            self._last = now
            return self._seconds
