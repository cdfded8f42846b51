"""Worker processes: every task done once, whoever dies, and nobody left behind."""

import faulthandler
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastmae import DataError
from fastmae.fork import fork, reap
from fastmae.workers import WorkerPool
from tests.support.processes import is_alive, wait_until


def double(task, at):
    at(task[0])
    return 2 * task[0]


def slowly(task, at):
    at(task[0])
    time.sleep(0.004)
    return 2 * task[0]


def run(pool, tasks, between=lambda: None):
    """Replies by task, and the deaths."""
    for task in tasks:
        pool.submit([task])
    replies, deaths = [], []
    while len(replies) < len(tasks):
        done, died = pool.collect(30.0)
        assert done or died, "no task came back"
        replies += [(task[0], reply) for task, reply, _ in done]
        if died:
            deaths += died
            pool.revive()
        between()
    return replies, deaths


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_every_task_is_done_once(workers):
    pool = WorkerPool(double, workers)
    replies, deaths = run(pool, range(1000))  # more than the socket holds
    pool.close()
    assert sorted(replies) == [(i, 2 * i) for i in range(1000)] and not deaths


def test_workers_killed_ten_times_at_random_moments_lose_nothing():
    chance = random.Random(0)
    pool = WorkerPool(slowly, 3)
    killed = []

    def kill():
        if len(killed) < 10:
            time.sleep(chance.uniform(0, 0.03))
            killed.append(chance.choice(pool.pids))
            os.kill(killed[-1], signal.SIGKILL)
            wait_until(lambda: not is_alive(killed[-1]))

    replies, deaths = run(pool, range(2000), kill)
    pids = pool.pids
    pool.close()
    assert sorted(replies) == [(i, 2 * i) for i in range(2000)]
    assert [d.pid for d in deaths] == killed and len(killed) == 10
    assert deaths[0].how == "was killed by SIGKILL (out of memory?)"
    assert not any(is_alive(p) for p in (*pids, *killed))


def test_the_sample_that_a_worker_died_at_is_known():
    def die(task, at):
        at(task[0])
        faulthandler.disable()  # or pytest's would print where
        os.kill(os.getpid(), signal.SIGSEGV)

    pool = WorkerPool(die, 1)
    pool.submit([77])
    deaths = []
    while not deaths:
        _, deaths = pool.collect(5.0)
    pool.close()
    assert deaths[0].sample == 77 and deaths[0].is_crash and deaths[0].how == "was killed by SIGSEGV"


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (DataError("shard gone"), DataError, "^shard gone$"),
        (KeyError("x"), RuntimeError, "a worker process failed:\n.*KeyError"),
    ],
)
@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_in_a_worker_comes_back(workers, error, kind, text):
    def fail(task, at):
        raise error

    pool = WorkerPool(fail, workers)
    pool.submit([1])
    [(task, reply, found)], deaths = pool.collect(5.0)
    pool.close()
    assert task == [1] and reply is None and type(found) is kind and re.search(f"(?s){text}", str(found)) and not deaths


def test_large_messages_arrive_both_ways_and_leave_no_handle_open():
    pool = WorkerPool(lambda task, at: task[::-1], 2)
    before = len(list(Path("/proc/self/fd").iterdir()))
    texts = [os.urandom(1 << 20), *(os.urandom(size) for size in range(400, 600))]
    for text in texts:
        pool.submit(text)
    replies = []
    while len(replies) < len(texts):
        replies += pool.collect(30.0)[0]
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    pool.close()
    assert sorted(replies) == sorted((text, text[::-1], None) for text in texts)


def test_more_large_messages_than_a_user_may_have_on_their_way_arrive():
    pid = fork()
    if pid == 0:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100))
            if os.getuid() == 0:  # whom this limit does not bind
                os.setuid(65534)
            pool = WorkerPool(lambda task, at: task[0][::-1], 2)
            replies, _ = run(pool, [bytes([i]) + bytes(1000) for i in range(250)])
            os._exit(0 if len({reply for _, reply in replies}) == 250 else 1)
        finally:
            os._exit(2)
    assert reap(pid, 0) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signals_to_the_process_group_leave_workers_at_work(number):
    pool = WorkerPool(slowly, 2)
    run(pool, range(4))
    for pid in pool.pids:
        os.kill(pid, number)
    replies, deaths = run(pool, range(50))
    pool.close()
    assert len(replies) == 50 and not deaths


def test_workers_that_cannot_be_started_are_one_error_and_leave_none(monkeypatch):
    pids = []

    def limited():
        if len(pids) == 2:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        pids.append(fork())
        return pids[-1]

    monkeypatch.setattr("fastmae.workers.fork", limited)
    message = "^3 worker processes cannot be started, Resource temporarily unavailable; use fewer --workers$"
    with pytest.raises(DataError, match=message):
        WorkerPool(double, 3)
    assert not any(is_alive(pid) for pid in pids)


def test_workers_end_when_their_parent_is_killed():
    code = """
import os, sys, time
from fastmae.fork import fork, reap
from fastmae.workers import WorkerPool
pool = WorkerPool(lambda task, at: time.sleep(0.05), 3)
for i in range(1000):
    pool.submit([i])
print(*pool.pids, flush=True)
time.sleep(600)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    with process:
        pids = [int(p) for p in process.stdout.readline().split()]
        assert len(pids) == 3 and all(is_alive(p) for p in pids)
        process.kill()
    assert wait_until(lambda: not any(is_alive(p) for p in pids))


def test_workers_end_with_a_pool_that_nobody_closed():
    pool = WorkerPool(double, 2)
    pids = pool.pids
    del pool
    assert wait_until(lambda: not any(is_alive(p) for p in pids))
