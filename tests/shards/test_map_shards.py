"""Work spread over processes: in order, with its own errors, and with nobody left behind."""

import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from multiprocessing import active_children

import pytest

from fastmae import DataError, InputError
from fastmae.shards.processes import map_shards
from fastmae.train.cli.interrupt import interrupts
from tests.support.processes import is_alive, wait_until


def slower_first(item):
    time.sleep(0.05 if item == 0 else 0)
    return item, os.getpid()


def refuse_three(item):
    if item == 3:
        raise InputError("item 3")
    return item


def die_at_three(item):
    if item == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return item


def interrupt_the_parent(item):
    os.kill(os.getppid(), signal.SIGINT)
    time.sleep(60)


@pytest.fixture(autouse=True)
def others():
    """Whoever a test starts has ended with it."""
    before = set(active_children())
    yield
    assert set(active_children()) == before


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_results_come_in_order_and_from_as_many_processes(workers):
    found = list(map_shards(slower_first, iter(range(50)), workers))
    assert [item for item, _ in found] == list(range(50))
    pids = {pid for _, pid in found}
    assert pids == {os.getpid()} if workers == 0 else os.getpid() not in pids and 1 <= len(pids) <= workers


@pytest.mark.parametrize("workers", [0, 2])
def test_nothing_to_do_is_no_result(workers):
    assert list(map_shards(slower_first, [], workers)) == []


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_is_raised_in_its_place(workers):
    found = []
    with pytest.raises(InputError, match=r"^item 3$"):
        for result in map_shards(refuse_three, range(50), workers):
            found.append(result)
    assert found == [0, 1, 2]


def test_a_process_that_is_killed_is_one_clear_error():
    with pytest.raises(DataError, match=r"^a worker process was killed; start again, with fewer --workers"):
        list(map_shards(die_at_three, range(50), 2))


def test_an_interrupt_does_not_wait_for_the_work_at_hand():
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt), interrupts(is_last=False):  # two signals are one interrupt
        list(map_shards(interrupt_the_parent, range(2), 2))
    assert time.monotonic() - start < 30


@pytest.mark.parametrize("workers", [0, 2])
def test_whoever_takes_some_results_only_leaves_no_process(workers):
    with closing(map_shards(slower_first, range(50), workers)) as results:
        assert next(results)[0] == 0


def test_processes_end_when_their_parent_is_killed_even_at_work():
    code = """
import os, time
from fastmae.shards.processes import map_shards

def work(item):
    os.write(1, b"%d\\n" % os.getpid())
    time.sleep(600)

list(map_shards(work, range(2), 2))
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        pids = [int(process.stdout.readline()) for _ in range(2)]
        assert len(set(pids)) == 2 and all(is_alive(pid) for pid in pids)
        process.kill()
    assert wait_until(lambda: not any(is_alive(pid) for pid in pids))
