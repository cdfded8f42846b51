"""Forked processes: started, waited for, killed."""

import contextlib
import gc
import os
import select
import signal
import threading
import time
import warnings
from collections.abc import Iterator

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGQUIT)
"""Those that a forked process begins with blocked."""
_PATIENCE = 5.0  # seconds to wait for a killed process; one that hangs in a dead file system outlives that


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold Ctrl-C back until the block has ended; a process that is forked in it does without.

    Around forks: their hooks would drop a KeyboardInterrupt. Blocking the signal does not keep it out of them: another thread
    takes it then, and Python still runs the handler in the main one.
    """
    owner, handler, held = os.getpid(), signal.getsignal(signal.SIGINT), []
    is_ours = callable(handler) and threading.current_thread() is threading.main_thread()
    if is_ours:
        signal.signal(signal.SIGINT, lambda number, frame: held.append(frame))
    try:
        yield
    finally:
        if is_ours:
            signal.signal(signal.SIGINT, handler)
            if held and os.getpid() == owner:
                handler(signal.SIGINT, held[0])


def fork() -> int:
    """``os.fork``; the child has the signals blocked, and never finalises what the parent made. Raises OSError like it.

    To be called inside ``uninterrupted``, else an interrupt may lose the child's id.
    """
    was_blocked, was_collecting = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS), gc.isenabled()
    gc.disable()
    pid = -1
    try:
        with warnings.catch_warnings():
            # Python warns of forks beside threads. A worker only reads, decodes and crops, and ends without cleaning up.
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
        if pid == 0:
            gc.freeze()
    finally:
        if was_collecting:
            gc.enable()
        if pid != 0:  # in the parent, even if there was no fork; last, as a signal that has waited may raise here
            signal.pthread_sigmask(signal.SIG_SETMASK, was_blocked)
    return pid


def reap(pid: int, options: int) -> int | None:
    """The exit code of ``pid``, minus the signal that killed it, or None while it lives."""
    try:
        found, status = os.waitpid(pid, options)
    except ChildProcessError:  # another has waited for it
        return 0
    return os.waitstatus_to_exitcode(status) if found else None


def readable(handles: list[int], timeout: float) -> set[int]:
    """Those of the file handles that can be read, or have ended, once there are any; none after ``timeout`` seconds."""
    poll = select.poll()  # select() takes no handle above 1023
    for handle in handles:
        poll.register(handle, select.POLLIN)
    return {handle for handle, _ in poll.poll(timeout * 1000)}


def kill(pids: list[int]) -> None:
    """End forked processes, and wait some seconds for it."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    until = time.monotonic() + _PATIENCE
    for pid in pids:
        while reap(pid, os.WNOHANG) is None and time.monotonic() < until:
            time.sleep(0.001)
