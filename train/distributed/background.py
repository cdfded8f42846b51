"""Run a call that may block in C++ in a thread, while the main thread, where signal handlers run, checks signals and time."""

import threading
import time
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

_TICK = 0.1  # seconds between two checks
_LEAST, _MOST = 0.005, 0.5  # seconds of a pause
_EACH = 1e-4  # least seconds of a pause for each process that asks: ten thousand requests per second in total
_NAME = "fastmae-background"

T = TypeVar("T")


class Background(Generic[T]):
    """A call of ``work`` in a thread of its own, begun at once."""

    def __init__(self, work: Callable[[], T]):
        self._ends: list[tuple[T | None, BaseException | None]] = []
        self._thread = threading.Thread(target=self._run, args=(work,), name=_NAME, daemon=True)
        self._thread.start()

    def wait(self, look: Callable[[float], None]) -> T:
        """The result or error of ``work``. Until then ``look`` is called with the elapsed seconds, several times a second.

        An exception of ``look`` or of a signal handler ends the wait and abandons the thread.
        """
        began = time.monotonic()
        while not self._ends:
            self._thread.join(_TICK)
            if not self._ends:
                look(time.monotonic() - began)
        given, error = self._ends[0]
        if error is not None:
            raise error
        return given

    def is_over(self, seconds: float = 0.0) -> bool:
        """Whether ``work`` has ended, at the latest in so many seconds."""
        self._thread.join(seconds)
        return bool(self._ends)

    def _run(self, work: Callable[[], T]) -> None:
        try:
            self._ends.append((work(), None))
        except BaseException as error:  # raised again by ``wait``
            self._ends.append((None, error))


def has_abandoned() -> bool:
    """Whether an abandoned thread is still running: in C++ the interpreter cannot end it."""
    return any(thread.name == _NAME for thread in threading.enumerate())


def pauses(processes: int) -> Iterator[float]:
    """Seconds to sleep between requests that as many ``processes`` make: a tenth of the elapsed time, within limits."""
    began, least = time.monotonic(), max(_LEAST, processes * _EACH)
    while True:
        yield max(min((time.monotonic() - began) / 10, _MOST), least)
