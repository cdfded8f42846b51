"""Processes of tests, forked from one that has imported everything, so that they begin at once.

Python keeps one such process, whatever the number of contexts: it is started here alone, or the imports and the number of
threads, on which the bits of a result depend, would be those of whoever came first.
"""

import functools
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from multiprocessing import forkserver
from unittest import mock


@functools.cache
def context():
    """The ``multiprocessing`` context of such processes; each computes in one thread."""
    made = multiprocessing.get_context("forkserver")
    made.set_forkserver_preload(["tests.support.forked_imports"])
    with mock.patch.dict(os.environ, OMP_NUM_THREADS="1"):  # read when torch is loaded, which is there or never
        forkserver.ensure_running()
    return made


def run_together(target: Callable, arguments: Sequence[tuple], seconds: float = 120) -> None:
    """``target`` in a process for each of ``arguments``; all must end well, and none outlives the call."""
    processes = [context().Process(target=target, args=each, daemon=True) for each in arguments]
    try:
        for process in processes:
            process.start()
        end = time.monotonic() + seconds
        while any(process.exitcode is None for process in processes):
            failed = [process for process in processes if process.exitcode]
            assert not failed and time.monotonic() < end, processes
            time.sleep(0.01)
        assert all(process.exitcode == 0 for process in processes), processes
    finally:
        for process in processes:
            if process.pid is not None:
                process.kill()
                process.join()
