"""Work on one shard after the other, spread over processes that end with their parent."""

import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from fastmae.errors import DataError


def map_shards(work: Callable, items: Iterable, workers: int) -> Iterator:
    """``work`` of each item in order, in ``workers`` processes or here. Raises DataError if a process dies."""
    if workers < 1:
        yield from map(work, items)
        return
    try:
        context = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(workers, context, initializer=_end_with, initargs=(os.getpid(),)) as pool:
            yield from pool.map(work, items)
    except BrokenProcessPool as error:
        raise DataError("a worker process was killed; start again, with fewer --workers if memory ran out") from error


def _end_with(parent: int) -> None:
    """Have this worker end when its parent is gone, whose siblings hold the pipe open that it waits at."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
