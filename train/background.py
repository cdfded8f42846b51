"""Waiting in a thread for what may wait in C++, while the main thread, where signal handlers run, looks at signals and time."""

import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

_TICK = 0.1  # seconds between two looks
_PAUSES = (0.005, 0.5)  # seconds, the least and the most
_NAME = "fastmae-background"

T = TypeVar("T")


def wait_in_thread(work: Callable[[], T], look: Callable[[float], None]) -> T:
    """What ``work`` gives, run in another thread, while this one calls ``look`` with the seconds gone, several times a second.

    Whatever ``look`` or a signal handler raises ends the wait and leaves the thread to itself.
    """
    ends: list[tuple[T | None, BaseException | None]] = []

    def run() -> None:
        try:
            ends.append((work(), None))
        except BaseException as error:  # raised again below
            ends.append((None, error))

    thread, began = threading.Thread(target=run, name=_NAME, daemon=True), time.monotonic()
    thread.start()
    while not ends:
        thread.join(_TICK)
        if not ends:
            look(time.monotonic() - began)
    given, error = ends[0]
    if error is not None:
        raise error
    return given


def still_waits() -> bool:
    """Whether a thread was left to itself and is at work yet: in C++ the interpreter cannot end it."""
    return any(thread.name == _NAME for thread in threading.enumerate())


def pauses() -> Iterator[float]:
    """Seconds to sleep between two looks at something, ever longer: a tenth of the time gone, at most half a second."""
    began = time.monotonic()
    while True:
        yield min(max((time.monotonic() - began) / 10, _PAUSES[0]), _PAUSES[1])
