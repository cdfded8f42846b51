"""Processes of tests, forked from one that has imported everything, so that they begin at once.

Python keeps one such process, whatever the number of contexts: it is started here alone, or the imports and the number of
threads, on which the bits of a result depend, would be those of whoever came first.
"""

import functools
import multiprocessing
import os
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
