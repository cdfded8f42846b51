"""Worker processes that may die: tasks go out, replies come back, and what a dead worker left unfinished is done again.

Workers are forked and take tasks from one socket of messages, so that a slow one delays nobody; a large message
travels as an anonymous file. When a worker dies, all are ended before the unfinished tasks go to new ones: nobody is left who
could still write into memory that is filled again. Workers end with their parent, however it ends and whatever they do.
"""

import contextlib
import itertools
import mmap
import os
import signal
import socket
import time
import traceback
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

from fastmae.clock import LOOK, RunClock
from fastmae.errors import DataError, InputError
from fastmae.fork import SIGNALS, fork, kill, readable, reap, uninterrupted
from fastmae.messages import receive, send

MAX_DEATHS = 3  # workers that may die while one result is waited for
MAX_CRASHES = 2  # of a worker at one sample, which is to blame then
_BUFFER = 1 << 20  # bytes asked for of a socket's buffer; systems grant a part of it, room for some hundred messages
_RETRY = 0.01  # seconds until a worker tries again to send
_LOOK = 2.0  # seconds between a worker's looks at whether its parent is still there


class Death(NamedTuple):
    """A worker that ended by itself."""

    worker: int
    pid: int
    cause: int
    """The signal that killed it, or minus its exit code."""
    sample: int
    """The sample, or of ``map_ordered`` the item, it was at, or -1."""

    @property
    def is_crash(self) -> bool:
        """Whether the worker's own code brought it down, and not a ``kill`` or the lack of memory."""
        return self.cause in (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGILL, signal.SIGFPE)

    @property
    def how(self) -> str:
        """What happened to it, for messages."""
        why = " (out of memory?)" if self.cause == signal.SIGKILL else ""
        return f"was killed by {signal.Signals(self.cause).name}{why}" if self.cause > 0 else f"exited with code {-self.cause}"


class Done(NamedTuple):
    """A task with what ``work`` returned, or raised: an InputError, else a RuntimeError with the traceback."""

    task: Any
    reply: Any
    error: Exception | None


class WorkerPool:
    """``workers`` processes that run ``work(task, at)``, or this process itself when there are none.

    ``work`` is inherited, tasks and replies are pickled. ``work`` calls ``at(sample)`` before each sample, so that a death can
    be named. Raises DataError if the system starts no more of them.
    """

    def __init__(self, work: Callable[[Any, Callable[[int], None]], Any], workers: int):
        self._work, self._count = work, workers
        self._numbers = itertools.count()
        self._waiting: deque[int] = deque()
        self._open: dict[int, Any] = {}  # in the order of submission
        self._at = np.frombuffer(mmap.mmap(-1, 8 * max(workers, 1)), np.int64)
        # A pipe that ends with a process -> its pid, in the order of the workers.
        self._processes: dict[int, int] = {}
        self._sockets: list[socket.socket] = []
        self.close = weakref.finalize(self, _end, os.getpid(), self._processes, self._sockets)
        """End the workers, also one that is stuck."""
        if workers:
            self._start()

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers."""
        return list(self._processes.values())

    def submit(self, task: Any) -> None:
        """Have ``task`` done, after those submitted before."""
        number = next(self._numbers)
        self._open[number] = task
        self._waiting.append(number)
        self._hand_out()

    def collect(self, timeout: float) -> tuple[list[Done], list[Death]]:
        """Wait for something to happen: tasks that are done, and workers that died, both perhaps none.

        ``timeout`` in seconds, without those in which the process was suspended; 0 only looks. After a death all workers are
        gone, until ``revive``.
        """
        if not self._count:
            if not self._waiting:
                return [], []
            task = self._open.pop(self._waiting.popleft())
            return [Done(task, *self._run(task, 0))], []
        clock = RunClock()
        while True:
            left = max(0.0, timeout - clock.read())
            ready = readable([self._results.fileno(), *self._processes], min(left, LOOK))
            done, deaths = self._drain(), []
            if dead := ready & self._processes.keys():
                deaths = self._end_all(dead)
                done += self._drain()
                _close(self._sockets)
            self._hand_out()
            if done or deaths or clock.read() >= timeout:
                return done, deaths

    def revive(self) -> None:
        """New workers for those that died, and for what they left undone."""
        self._waiting = deque(self._open)
        self._start()
        self._hand_out()

    def positions(self) -> list[tuple[int, int]]:
        """(pid, sample it is at or -1) of each worker."""
        return list(zip(self.pids, self._at.tolist(), strict=False))

    def _hand_out(self) -> None:
        """Send tasks until the socket is full; never wait for a worker, which may wait to send a result itself."""
        while self._processes and self._waiting:
            number = self._waiting[0]
            try:
                if not send(self._tasks, (number, self._open[number]), socket.MSG_DONTWAIT):
                    return
            except ConnectionError:  # no worker is left; ``collect`` finds that
                return
            self._waiting.popleft()

    def _drain(self) -> list[Done]:
        done = []
        with contextlib.suppress(BlockingIOError):
            while message := receive(self._results, socket.MSG_DONTWAIT):  # none when no worker is left
                number, *result = message
                done.append(Done(self._open.pop(number), *result))
        return done

    def _run(self, task: Any, worker: int) -> tuple[Any, Exception | None]:
        def at(sample: int) -> None:
            self._at[worker] = sample

        try:
            return self._work(task, at), None
        except InputError as error:
            return None, error
        except Exception:  # of any type, perhaps none that can be pickled
            return None, RuntimeError(f"a worker process failed:\n{traceback.format_exc()}")
        finally:
            at(-1)

    def _start(self) -> None:
        self._tasks, tasks = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._results, results = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._sockets += (self._tasks, self._results)
        for end in (self._tasks, results):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER)
        self._at[:] = -1
        parent = os.getpid()
        try:
            with uninterrupted():
                for worker in range(self._count):
                    end, kept = os.pipe()
                    pid = fork()
                    if pid == 0:
                        try:
                            self._serve(worker, parent, tasks, results)
                        except BaseException:
                            traceback.print_exc()
                        finally:
                            os._exit(1)
                    os.close(kept)  # now the worker alone holds it
                    self._processes[end] = pid
        except BaseException as error:  # an interrupt, or a limit on processes, memory or open files
            self.close()
            if isinstance(error, OSError):
                raise DataError(
                    f"{self._count} worker processes cannot be started, {error.strerror}; use fewer --workers"
                ) from error
            raise
        finally:
            tasks.close()
            results.close()

    def _serve(self, worker: int, parent: int, tasks: socket.socket, results: socket.socket) -> None:
        """The life of a worker."""
        # A signal to the whole process group is for the parent, which ends its workers itself; a run saves before that.
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        # Another fork of the parent may hold its sockets open after its end, and a task may take minutes. No thread looks: a
        # process with one is not seen to be dead until that has ended too.
        signal.signal(signal.SIGALRM, lambda number, frame: os._exit(1) if os.getppid() != parent else None)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (*SIGNALS, signal.SIGALRM))
        signal.setitimer(signal.ITIMER_REAL, _LOOK, _LOOK)
        torch.set_num_threads(1)
        _close(self._sockets)
        with contextlib.suppress(ConnectionError):  # the parent is gone
            while message := receive(tasks):
                number, task = message
                reply = number, *self._run(task, worker)
                while not send(results, reply):
                    time.sleep(_RETRY)
        os._exit(0)

    def _end_all(self, dead: set[int]) -> list[Death]:
        """End every worker; return those that ended by themselves, whose pipes ``dead`` names or that are found so."""
        codes = [(pid, reap(pid, 0 if end in dead else os.WNOHANG)) for end, pid in self._processes.items()]
        _kill(self._processes, [pid for pid, code in codes if code is None])
        return [Death(i, pid, -code, int(self._at[i])) for i, (pid, code) in enumerate(codes) if code is not None]


def _end(owner: int, processes: dict[int, int], sockets: list[socket.socket]) -> None:
    if os.getpid() == owner:  # in a fork of the parent the pool is a mere copy
        _kill(processes, list(processes.values()))
        _close(sockets)


def _kill(processes: dict[int, int], alive: list[int]) -> None:
    """End those ``alive``, and forget all."""
    kill(alive)
    for end in processes:
        os.close(end)
    processes.clear()


def _close(sockets: list[socket.socket]) -> None:
    for end in sockets:
        end.close()
    sockets.clear()
