"""Signals that ask a run to stop: it finishes its step, saves, and exits."""

import faulthandler
import signal
import time
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGQUIT)
_OF_TERMINAL = (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
_REPEATED = 5.0  # seconds; launchers and clusters send the same signal twice within moments


class StopSignals:
    """Within it, the signals of ``SIGNALS`` are noted instead of ending the process. SIGQUIT also has the stacks of all threads
    written to standard error, at once, whatever they do.

    What a terminal sends (SIGINT, SIGHUP, SIGQUIT) stays ignored where the process was started so, by nohup, or by a script
    that put it in the background: it should outlive the terminal. SIGTERM, SIGUSR1 and SIGUSR2 are meant for this process.

    Once one has come, the others but SIGINT stay without effect afterwards, where they would end the process: launchers repeat
    them, and a run that has saved is to end with its own exit code.
    """

    def __init__(self):
        self.received: str | None = None
        """The name of the first signal, once there was one."""
        self._at = 0.0
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopSignals":
        noted = [n for n in SIGNALS if n not in _OF_TERMINAL or signal.getsignal(n) is not signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._note) for number in noted}
        if signal.SIGQUIT in self._before:
            faulthandler.register(signal.SIGQUIT, file=2, all_threads=True, chain=True)
        return self

    def __exit__(self, *_) -> None:
        faulthandler.unregister(signal.SIGQUIT)
        for number, handler in self._before.items():
            is_void = self.received and number != signal.SIGINT and handler is signal.SIG_DFL
            signal.signal(number, signal.SIG_IGN if is_void else handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.received is None:
            self.received, self._at = signal.Signals(number).name, now
        elif number in (signal.SIGINT, signal.SIGQUIT) and now - self._at > _REPEATED:  # repeated by hand: stop now
            raise KeyboardInterrupt
