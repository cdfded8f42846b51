"""Ctrl-C reaches the command line, also from where Python or other code drops an exception."""

import os
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import pytest

from fastmae.train.cli import interrupt
from fastmae.train.cli.interrupt import interrupts
from tests.support.processes import wait_until


class Thing:
    """What a weak reference may watch."""


def interrupted_in_a_callback():
    thing = Thing()
    watch = weakref.ref(thing, lambda _: signal.raise_signal(signal.SIGINT))
    del thing
    return watch


def interrupted_and_caught():
    try:
        signal.raise_signal(signal.SIGINT)
    except BaseException:
        return


@pytest.mark.parametrize("drop", [interrupted_in_a_callback, interrupted_and_caught])
def test_an_interrupt_that_is_dropped_is_raised_again(drop, capsys, monkeypatch):
    monkeypatch.setattr(interrupt, "_AGAIN", 0.2)
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGALRM), sys.unraisablehook
    with pytest.raises(KeyboardInterrupt), interrupts(is_last=False):
        drop()
        time.sleep(10)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGALRM), sys.unraisablehook) == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    assert capsys.readouterr() == ("", "")


def test_an_interrupt_that_becomes_another_error_is_an_interrupt():
    with pytest.raises(KeyboardInterrupt), interrupts(is_last=False):
        interrupted_and_caught()
        raise ImportError("a module in C could not be loaded")


def test_a_signal_sent_twice_is_one_interrupt():
    cleaned = False
    with pytest.raises(KeyboardInterrupt), interrupts(is_last=False):
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            signal.raise_signal(signal.SIGINT)
            cleaned = True
    assert cleaned


def test_cleaning_up_is_not_interrupted_until_a_person_insists():
    seen = []
    with pytest.raises(KeyboardInterrupt), interrupts(is_last=False):
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            time.sleep(1.2)
            seen.append("cleaned up")
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
    assert seen == ["cleaned up"]


@pytest.mark.parametrize(("is_interrupted", "handler"), [(False, signal.SIG_DFL), (True, signal.SIG_IGN)])
def test_what_comes_after_the_last_thing_prints_nothing(is_interrupted, handler):
    try:
        with interrupts(is_last=True):
            if is_interrupted:
                signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        pass
    found = signal.signal(signal.SIGINT, signal.default_int_handler)
    assert found == handler


def test_a_process_that_ignores_interrupts_goes_on_ignoring_them():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interrupts(is_last=True):
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("to_group", [True, False], ids=["as a terminal does", "alone"])
def test_an_interrupt_ends_a_benchmark_too_with_one_line(to_group):
    command = [sys.executable, "-m", "fastmae.train", "bench", "kernels", "--models", "huge"]
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as bench:
        children = Path(f"/proc/{bench.pid}/task/{bench.pid}/children")
        assert wait_until(lambda: children.read_text(), 30)
        program = Path(f"/proc/{children.read_text().split()[0]}/cmdline")
        assert wait_until(lambda: "fastmae.benchmarks" in program.read_text(), 30)
        time.sleep(1.5)  # past its first imports
        (os.killpg if to_group else os.kill)(bench.pid, signal.SIGINT)
        assert bench.stderr.read() == "fastmae bench: interrupted\n"
        assert bench.wait(30) == 130
