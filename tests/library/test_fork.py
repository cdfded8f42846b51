"""Forked processes: begun quietly, told apart when they end, and gone when they are killed."""

import gc
import os
import signal
import time

import pytest

from fastmae.fork import SIGNALS, fork, kill, readable, reap, uninterrupted
from tests.support.processes import is_alive


def test_a_child_begins_with_its_signals_blocked_and_the_parent_keeps_its_own():
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    pid = fork()
    if pid == 0:
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [])
        os._exit(0 if set(SIGNALS) <= blocked and gc.get_freeze_count() > 0 and gc.isenabled() else 1)
    assert reap(pid, 0) == 0
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before and gc.isenabled()


def test_an_interrupt_waits_for_the_end_of_a_fork_and_is_the_parents_alone():
    pids = []
    with pytest.raises(KeyboardInterrupt), uninterrupted():
        signal.raise_signal(signal.SIGINT)
        pids.append(fork())
        if pids == [0]:
            signal.raise_signal(signal.SIGINT)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # which runs the handler
            os._exit(0)
    assert reap(pids[0], 0) == 0


def test_collection_that_was_off_stays_off():
    gc.disable()
    try:
        pid = fork()
        if pid == 0:
            os._exit(1 if gc.isenabled() else 0)
        assert reap(pid, 0) == 0 and not gc.isenabled()
    finally:
        gc.enable()


def test_a_fork_that_fails_leaves_the_parent_as_it_was(monkeypatch):
    def fail():
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", fail)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    with pytest.raises(BlockingIOError):
        fork()
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before and gc.isenabled()


def test_ends_are_told_apart():
    codes = []
    for action in (lambda: os._exit(7), lambda: os.kill(os.getpid(), signal.SIGKILL)):
        pid = fork()
        if pid == 0:
            action()
        codes.append(reap(pid, 0))
    assert codes == [7, -signal.SIGKILL]
    assert reap(2**22 - 1, os.WNOHANG) == 0  # no child of ours: somebody else has waited for it


def test_killed_processes_are_gone_and_their_pipes_end():
    pipes, pids = [], []
    for _ in range(3):
        end, kept = os.pipe()
        pid = fork()
        if pid == 0:
            time.sleep(600)
        os.close(kept)
        pipes.append(end)
        pids.append(pid)
    assert readable(pipes, 0) == set()
    kill(pids)
    assert readable(pipes, 5) == set(pipes) and not any(is_alive(pid) for pid in pids)
    for end in pipes:
        os.close(end)
