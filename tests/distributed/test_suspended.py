"""Processes that are suspended for longer than they would wait for something: they continue, as if no time had passed.

They are stopped together, and stopped once. Runs of several processes: ``test_lost_processes.py``.
"""

import contextlib
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from fastmae.clock import LOOK
from fastmae.data.torch_workers import ignore_signals, patiently
from fastmae.train.distributed.watch import Watch
from fastmae.train.distributed.watchdog import Watchdog
from fastmae.train.distributed.world import World
from fastmae.workers import WorkerPool
from tests.support.crew import speak_into
from tests.support.forked import context

pytestmark = pytest.mark.cluster
PATIENCE = 5.0  # seconds that each process waits
SUSPENDED = PATIENCE + 6.0  # more than the watchdog's five seconds above it, too
NEEDED = 1.5  # seconds that it takes, once it runs, for what is waited for to come


def work(*_):
    """For ``NEEDED`` seconds in which this process runs."""
    for _ in range(15):
        time.sleep(NEEDED / 15)


def watch_a_step():
    watched = Watch(World(0, 1, torch.device("cpu")), Path.cwd(), first=PATIENCE, later=PATIENCE)
    watched.beat(1, "in a step")
    yield
    work()
    watched.end()


def let_the_watchdog_wait():
    """As if the main thread kept Python, and so the watch from speaking, up to the moment of the suspension and after it."""
    dog = Watchdog()
    dog.beat(PATIENCE)
    yield
    work()
    dog.end()


def wait_for_a_worker():
    pool = WorkerPool(work, 1)
    pool.submit([1])
    yield
    done, deaths = pool.collect(PATIENCE)
    pool.close()
    assert [task for task, *_ in done] == [[1]] and not deaths


class Slow(IterableDataset):
    def __iter__(self):
        work()
        yield 1


def wait_for_a_stream():
    loader = DataLoader(Slow(), batch_size=None, num_workers=1, timeout=LOOK, worker_init_fn=ignore_signals,
                        multiprocessing_context="fork")  # fmt: skip
    items = patiently(loader, PATIENCE, "a source")
    yield
    assert list(items) == [1]


KINDS = {f.__name__: f for f in (watch_a_step, let_the_watchdog_wait, wait_for_a_worker, wait_for_a_stream)}


def process(name, folder):
    os.setpgid(0, 0)
    os.chdir(folder)
    speak_into(folder / "console")
    steps = KINDS[name]()
    next(steps)
    (folder / "waits").touch()
    for _ in steps:
        pass


@pytest.fixture(scope="module")
def ends(tmp_path_factory):
    """Exit code and words of each kind of process, all suspended while they waited."""
    folders = {name: tmp_path_factory.mktemp(name) for name in KINDS}
    processes = {name: context().Process(target=process, args=(name, folder)) for name, folder in folders.items()}
    try:
        for each in processes.values():
            each.start()
        until = time.monotonic() + 60
        while not all((folder / "waits").exists() for folder in folders.values()):
            assert time.monotonic() < until
            time.sleep(0.05)
        time.sleep(0.3)  # into its wait
        for number, seconds in ((signal.SIGSTOP, SUSPENDED), (signal.SIGCONT, 0)):
            for each in processes.values():
                with contextlib.suppress(ProcessLookupError):  # ended already, which its exit code tells
                    os.killpg(each.pid, number)
            time.sleep(seconds)
        for each in processes.values():
            each.join(60)
        yield {name: (each.exitcode, (folders[name] / "console").read_text()) for name, each in processes.items()}
    finally:
        for each in processes.values():
            if each.exitcode is None:
                os.killpg(each.pid, signal.SIGKILL)


@pytest.mark.parametrize("name", KINDS)
def test_a_process_that_was_suspended_goes_on(name, ends):
    assert ends[name] == (0, "")
