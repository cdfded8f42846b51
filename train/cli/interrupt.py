"""Ctrl-C: one KeyboardInterrupt that reaches the command line, wherever the program was.

Python drops an exception that is raised in a hook around a fork, in a finaliser or in a callback of a weak reference; it prints
"Exception ignored in" and continues. C code may drop one too, or make it an ImportError. A dropped interrupt is raised again.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

from fastmae.train.console import outlived

_AGAIN = 10.0  # seconds after which a process that still runs is interrupted again; cleaning up takes less
_REPEATED = 1.0  # seconds in which two signals are one: a terminal and a launcher may both have sent it
_SOON = 0.01  # seconds until a dropped one is raised again, outside the code that dropped it


@contextlib.contextmanager
def interrupts(*, is_last: bool) -> Iterator[None]:
    """A block that SIGINT ends with KeyboardInterrupt, repeated until it has; a second SIGINT within a second changes nothing.

    ``is_last``: the process does nothing after it; a later SIGINT ends it silently, or changes nothing if it was
    interrupted, and has its exit code.
    Nothing changes outside the main thread, nor where the process was started to ignore SIGINT or has a handler of its own.
    """
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler or not _is_main_thread():
        yield
        return
    on_unraisable, on_alarm, came, is_over = sys.unraisablehook, None, None, False

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal came, on_alarm
        if number == signal.SIGINT:
            if came is None:
                on_alarm = signal.signal(signal.SIGALRM, interrupt)
            elif time.monotonic() - came < _REPEATED:
                return
            came = time.monotonic()
            signal.setitimer(signal.ITIMER_REAL, _AGAIN, _AGAIN)
        if not is_over:
            raise KeyboardInterrupt

    def dropped(unraisable: "sys.UnraisableHookArgs") -> None:
        if came is not None and issubclass(unraisable.exc_type, KeyboardInterrupt):
            signal.setitimer(signal.ITIMER_REAL, _SOON, _AGAIN)
        else:
            on_unraisable(unraisable)

    sys.unraisablehook = dropped
    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    except Exception as error:
        if came is not None:
            raise KeyboardInterrupt from error
        raise
    finally:
        is_over = True
        if came is not None:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, on_alarm)
        at_end = signal.SIG_DFL if came is None else signal.SIG_IGN
        signal.signal(signal.SIGINT, at_end if is_last else signal.default_int_handler)
        sys.unraisablehook = on_unraisable


def end(code: int) -> NoReturn:
    """End the process at once: the interpreter may need seconds to unload torch's modules."""
    with outlived():  # flushes or drops its output
        pass
    os._exit(code)


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
