"""Workers of torch's DataLoader: waited for with patience, missed when they die, and ended whatever they do."""

import signal
import threading
import time
from collections.abc import Iterator
from multiprocessing import active_children
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize

from torch.utils.data import DataLoader
from torch.utils.data._utils.signal_handling import _remove_worker_pids

from fastmae.clock import RunClock
from fastmae.errors import DataError
from fastmae.fork import SIGNALS

_GRACE = 2.0  # seconds for workers that are asked to end
_TO_END = 5.0  # seconds for workers that were killed


def ignore_signals(_: int) -> None:
    """A signal to the whole process group is for the training process: it saves and ends its workers itself."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def patiently(loader: DataLoader, patience: float, source: str) -> Iterator:
    """What ``loader`` gives. Raises DataError if nothing comes from ``source`` for ``patience`` seconds, or if a worker dies.

    Its workers have ended when this generator has, or when the program does. They may ignore all signals but SIGKILL.
    """
    others = set(active_children())
    items = iter(loader)
    processes = set(active_children()) - others
    if loader.num_workers:
        # Else torch's handler of SIGCHLD would raise wherever the program is; a dead worker is found where it is waited for.
        _remove_worker_pids(id(items))
        items._worker_pids_set = False
    # At the program's end multiprocessing waits for its processes, and these ignore the signal it ends them with.
    at_exit = Finalize(None, _kill, (processes,), exitpriority=0)
    try:
        yield from _wait(items, patience)
    except (RuntimeError, OSError, EOFError) as error:  # what torch's queues raise depends on where the worker was
        if "timed out" in str(error):
            raise DataError(f"no data for {patience:.0f} s from {source}; does its source answer?") from error
        if not (dead := _dead(processes)):
            raise
        raise DataError(
            f"loader worker {dead[0].pid} died, {_cause(dead[0].exitcode)}; start again, with fewer workers if memory or "
            "/dev/shm ran out (`fastmae doctor`)"
        ) from error
    finally:
        _end(items, processes)
        at_exit.cancel()


def _wait(items: Iterator, patience: float) -> Iterator:
    """``items``, waited for longer than the loader's own timeout."""
    clock, since = RunClock(), 0.0
    while True:
        try:
            item = next(items)
        except StopIteration:
            return
        except RuntimeError as error:
            if "timed out" not in str(error) or clock.read() - since >= patience:
                raise
        else:
            yield item
            since = clock.read()


def _dead(processes: set[BaseProcess]) -> list[BaseProcess]:
    """Those that ended by themselves; a connection breaks a moment before its process is seen to be gone."""
    until = time.monotonic() + 1
    while not (dead := [p for p in processes if p.exitcode not in (None, 0)]) and time.monotonic() < until:
        time.sleep(0.01)
    return dead


def _cause(code: int) -> str:
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"


def _end(items: Iterator, processes: set[BaseProcess]) -> None:
    """End the workers within seconds, whatever they do, and whoever holds ``items`` still: a traceback may."""
    # torch would wait ten seconds for each that is stuck in a read, one after the other; so they are killed meanwhile.
    killer = threading.Timer(_GRACE, _kill, (processes,))
    try:
        if any(process.is_alive() for process in processes):
            killer.start()
        if processes:
            items._shutdown_workers()
    finally:
        killer.cancel()
        _kill(processes)
        for process in processes:
            process.join(_TO_END)


def _kill(processes: set[BaseProcess]) -> None:
    for process in processes:
        process.kill()
