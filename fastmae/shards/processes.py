"""Work on one shard after the other, spread over processes that end with their parent."""

import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from fastmae.errors import DataError
from fastmae.fork import uninterrupted


def map_shards(work: Callable, items: Iterable, workers: int) -> Iterator:
    """``work`` of each item in order, in ``workers`` processes or here. Raises DataError if a process dies."""
    if workers < 1:
        yield from map(work, items)
        return
    try:
        context = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(workers, context, initializer=_end_with, initargs=(os.getpid(),)) as pool:
            before = set(multiprocessing.active_children())
            try:
                with uninterrupted():
                    results = deque(pool.submit(work, item) for item in items)  # the first forks them all
                while results:
                    yield results.popleft().result()
            except BaseException:  # an interrupt above all: a shard may take minutes, and the pool would wait for it
                for process in set(multiprocessing.active_children()) - before:
                    process.kill()
                raise
    except BrokenProcessPool as error:
        raise DataError("a worker process was killed; start again, with fewer --workers if memory ran out") from error


def _end_with(parent: int) -> None:
    """Have this worker end when its parent is gone, whose siblings hold the pipe open that it waits at.

    Ctrl-C is for the parent, which ends its workers.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
