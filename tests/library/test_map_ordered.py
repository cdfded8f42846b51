"""Work spread over processes: in order, with its own errors, whoever dies, and with nobody left behind."""

import faulthandler
import os
import signal
import subprocess
import sys
import time
import warnings
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest

from fastmae import InputError
from fastmae.errors import WorkerError
from fastmae.map_ordered import map_ordered
from fastmae.train.cli.interrupt import interrupts
from tests.support.processes import is_alive, wait_until


def slower_first(item):
    time.sleep(0.05 if item == 0 else 0)
    return item, os.getpid()


def refuse_three(item):
    if item == 3:
        raise InputError("item 3")
    return item


def die_at_three(number, item):
    if item == 3:
        faulthandler.disable()  # or pytest's would print where
        os.kill(os.getpid(), number)
    return item


def interrupt_the_parent(item):
    os.kill(os.getppid(), signal.SIGINT)
    time.sleep(60)


def children():
    return {pid for path in Path("/proc/self/task").glob("*/children") for pid in path.read_text().split()}


@pytest.fixture(autouse=True)
def others():
    """Whoever a test starts has ended with it."""
    before = children()
    yield
    assert children() == before


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_results_come_in_order_and_from_as_many_processes(workers):
    found = list(map_ordered(slower_first, iter(range(50)), workers))
    assert [item for item, _ in found] == list(range(50))
    pids = {pid for _, pid in found}
    assert pids == {os.getpid()} if workers == 0 else os.getpid() not in pids and 1 <= len(pids) <= workers


@pytest.mark.parametrize("workers", [0, 2])
def test_nothing_to_do_is_no_result(workers):
    assert list(map_ordered(slower_first, [], workers)) == []


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_is_raised_in_its_place(workers):
    found = []
    with pytest.raises(InputError, match=r"^item 3$"):
        for result in map_ordered(refuse_three, range(50), workers):
            found.append(result)
    assert found == [0, 1, 2]


@pytest.mark.parametrize(
    ("number", "line"),
    [
        (signal.SIGKILL, r"SIGKILL \(out of memory\?\) at item 3, the last of 4 consecutive deaths; use fewer --workers"),
        (signal.SIGSEGV, r"SIGSEGV at item 3, 2 times; remove what crashes it"),
    ],
)
def test_a_process_that_dies_again_and_again_is_one_clear_error(number, line):
    with (
        pytest.warns(UserWarning, match=r"^worker process \d+ was killed by .* at item 3; its work is done again$"),
        pytest.raises(WorkerError, match=rf"^worker process \d+ was killed by {line}"),
    ):
        list(map_ordered(partial(die_at_three, number), range(50), 2, name=lambda item: f"item {item}"))


def test_workers_that_are_killed_are_named_and_lose_nothing():
    found, killed, others = [], [], children()
    with warnings.catch_warnings(record=True) as caught, closing(map_ordered(slower_first, range(300), 2)) as results:
        warnings.simplefilter("always")
        for item, _ in results:
            found.append(item)
            if item % 60 == 5:
                killed.append(int(min(children() - others)))
                os.kill(killed[-1], signal.SIGKILL)
                assert wait_until(lambda: not is_alive(killed[-1]))
    assert found == list(range(300)) and len(killed) == 5
    assert [str(w.message).split()[2] for w in caught] == [str(pid) for pid in killed]


def test_few_items_are_taken_ahead():
    taken = []
    with closing(map_ordered(slower_first, (taken.append(i) or i for i in range(500)), 2)) as results:
        for _ in range(20):
            next(results)
    assert 20 < len(taken) <= 20 + 16


def test_an_interrupt_does_not_wait_for_the_work_at_hand():
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt), interrupts(is_last=False):  # two signals are one interrupt
        list(map_ordered(interrupt_the_parent, range(2), 2))
    assert time.monotonic() - start < 30


@pytest.mark.parametrize("workers", [0, 2])
def test_whoever_takes_some_results_only_leaves_no_process(workers):
    with closing(map_ordered(slower_first, range(50), workers)) as results:
        assert next(results)[0] == 0


def test_processes_end_when_their_parent_is_killed_even_at_work():
    code = """
import os, time
from fastmae.map_ordered import map_ordered

def work(item):
    os.write(1, b"%d\\n" % os.getpid())
    time.sleep(600)

list(map_ordered(work, range(2), 2))
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        pids = [int(process.stdout.readline()) for _ in range(2)]
        assert len(set(pids)) == 2 and all(is_alive(pid) for pid in pids)
        process.kill()
    assert wait_until(lambda: not any(is_alive(pid) for pid in pids))
