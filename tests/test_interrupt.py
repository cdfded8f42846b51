"""Ctrl-C reaches the command line, also from where Python or other code drops an exception."""

import signal
import sys
import time
import weakref

import pytest

from fastmae.train.interrupt import interrupts


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
def test_an_interrupt_that_is_dropped_is_raised_again(drop, capsys):
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


@pytest.mark.parametrize(("is_interrupted", "handler"), [(False, signal.SIG_IGN), (True, signal.SIG_DFL)])
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
