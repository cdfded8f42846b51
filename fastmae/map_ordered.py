"""Work on one item after the other, spread over worker processes: results in order, and few of them wait in memory."""

import itertools
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from typing import Any

from fastmae.clock import LOOK
from fastmae.errors import WorkerError
from fastmae.workers import MAX_CRASHES, MAX_DEATHS, Death, Done, WorkerPool

_AHEAD = 8  # items per worker that run or wait, so that a slow one, or a consumer at the disk, idles nobody


def map_ordered(work: Callable[[Any], Any], items: Iterable, workers: int, *, name: Callable[[Any], str] = str) -> Iterator:
    """``work`` of each item in order, by ``workers`` processes or, if 0, here; close it if it is not read to its end.

    At most 8 items per worker are in flight. ``work`` is inherited, items and results are pickled. What ``work`` raises is
    raised at its item, as ``Done`` says. A worker that dies is named in a warning, with ``name(item)``, and its work is done
    again; WorkerError if 4 die while one result is waited for, or if the same item crashes two.
    """
    if not workers:
        yield from map(work, items)
        return

    def run(task: tuple[int, Any], at: Callable[[int], None]) -> Any:
        at(task[0])
        return work(task[1])

    def note(death: Death) -> None:
        nonlocal deaths
        has_item = death.sample >= 0
        line = f"worker process {death.pid} {death.how}" + (f" at {name(in_flight[death.sample])}" if has_item else "")
        if has_item and death.is_crash:
            crashes[death.sample] += 1
            if crashes[death.sample] >= MAX_CRASHES:
                raise WorkerError(f"{line}, {MAX_CRASHES} times; remove what crashes it")
        else:
            deaths += 1
            if deaths > MAX_DEATHS:
                raise WorkerError(f"{line}, the last of {deaths} consecutive deaths; use fewer --workers than {workers}")
        warnings.warn(f"{line}; its work is done again", stacklevel=3)

    todo = enumerate(items)
    in_flight: dict[int, Any] = {}
    results: dict[int, Done] = {}
    crashes: Counter[int] = Counter()
    with closing(WorkerPool(run, workers)) as pool:
        for number in itertools.count():
            for task in itertools.islice(todo, _AHEAD * workers - len(in_flight)):
                in_flight[task[0]] = task[1]
                pool.submit(task)
            if not in_flight:
                return
            deaths = 0
            while number not in results:
                done, dead = pool.collect(LOOK)
                results |= {result.task[0]: result for result in done}
                for death in dead:
                    note(death)
                if dead:
                    pool.revive()
            del in_flight[number]
            result = results.pop(number)
            if result.error:
                raise result.error
            yield result.reply
