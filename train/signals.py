"""Signals that ask a run to stop: it ends the step it is in, saves, and ends well."""

import signal
import time
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
_REPEATED = 5.0  # seconds; launchers and clusters send the same signal twice within moments


class StopSignals:
    """Within it, the signals of ``SIGNALS`` are noted instead of ending the process.

    Once one has come, the others but SIGINT stay without effect afterwards, where they would end the process: launchers repeat
    them, and a run that has saved is to end with its own exit code.
    """

    def __init__(self):
        self.received: str | None = None
        """The name of the first signal, once there was one."""
        self._at = 0.0
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopSignals":
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            is_void = self.received and number != signal.SIGINT and handler is signal.SIG_DFL
            signal.signal(number, signal.SIG_IGN if is_void else handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.received is None:
            self.received, self._at = signal.Signals(number).name, now
        elif number == signal.SIGINT and now - self._at > _REPEATED:  # Ctrl-C again after a while: the person means now
            raise KeyboardInterrupt
