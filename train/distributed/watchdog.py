"""Ends a process whose Python interpreter does not run: a call into C that never releases the GIL stops its own watch, too.

A small child counts the time since the watch's last beat, in short ticks while the process could run: a process that is
stopped does not count, and a child that is stopped with it does not either. A timer of the system's would go off as soon as the
process continues. The child is this file as a program of its own, of the standard library alone, so that it costs milliseconds.
"""

import contextlib
import faulthandler
import os
import select
import signal
import struct
import sys
import time

STACKS = signal.SIGRTMIN
"""The signal by which the child has the process write its stacks to standard error; it does not need the GIL."""
_BLOCKED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)  # not for the child
_TICK = 0.5  # seconds
_TO_WRITE = 2.0  # seconds for the stacks, before the process is killed
_LIMIT = struct.Struct("d")


class Watchdog:
    """The child, and the pipe to it. It kills the process that does not beat within the seconds its last ``beat`` allowed."""

    def __init__(self):
        """Raises OSError if no process can be started."""
        faulthandler.register(STACKS, file=2, all_threads=True)
        theirs, ours = os.pipe()
        os.set_blocking(ours, False)
        self._pipe = os.fdopen(ours, "wb", buffering=0)
        command = [sys.executable, "-I", "-S", __file__, str(os.getpid())]
        try:
            # A session of its own, and signals blocked: what a terminal or a launcher sends is for the process.
            self._pid = os.posix_spawn(
                command[0],
                command,
                os.environ,
                file_actions=[(os.POSIX_SPAWN_DUP2, theirs, 0), (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)],
                setsid=True,
                setsigmask=_BLOCKED,
            )
        except OSError:
            self._pipe.close()
            raise
        finally:
            os.close(theirs)

    def beat(self, limit: float) -> None:
        """Python runs; it has to run again within ``limit`` seconds."""
        with contextlib.suppress(BrokenPipeError, ValueError):  # the child was killed or has been ended
            self._pipe.write(_LIMIT.pack(limit))

    def end(self) -> None:
        """End the child."""
        self._pipe.close()
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)
        faulthandler.unregister(STACKS)


def guard(process: int) -> None:
    """The main loop of the child of ``process``, which writes limits to standard input, and closes it to end the child."""
    os.closerange(3, 1 << 20)
    state = os.open(f"/proc/{process}/stat", os.O_RDONLY)
    poll = select.poll()
    poll.register(0, select.POLLIN)
    limit, silent = float("inf"), 0.0
    while os.getppid() == process:
        if poll.poll(_TICK * 1000):
            data = os.read(0, 1 << 12)
            if not data:
                return
            limit, silent = _LIMIT.unpack(data[-_LIMIT.size :])[0], 0.0
        elif not _is_stopped(state):
            silent += _TICK
            if silent > limit:
                os.kill(process, STACKS)
                if not poll.poll(_TO_WRITE * 1000) and os.getppid() == process:  # it has not ended meanwhile
                    _kill(process, silent)


def _kill(process: int, silent: float) -> None:
    line = (
        f"fastmae: process {process} is killed: Python has not run in it for {silent:.0f} s, because a call holds the "
        "interpreter's lock; the stacks of its threads are above\n"
    )
    if select.select([], [2], [], _TO_WRITE)[1]:  # a console without a reader must not keep the process alive
        with contextlib.suppress(OSError):
            os.write(2, line.encode())
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)
    time.sleep(_TICK)


def _is_stopped(state: int) -> bool:
    """Whether a signal or a debugger has stopped the process whose ``/proc/PID/stat`` is open as ``state``."""
    try:
        return os.pread(state, 1 << 10, 0).rpartition(b")")[2].split()[0] in (b"T", b"t")
    except OSError:  # it has ended
        return False


if __name__ == "__main__":
    guard(int(sys.argv[1]))
