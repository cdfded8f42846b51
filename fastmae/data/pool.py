"""Worker processes that may die: tasks go out, replies come back, and what a dead worker left undone is done again.

Workers are forked and take tasks from one socket that keeps messages whole, so that a slow one delays nobody. When one dies,
all are ended before the unfinished tasks go to new ones: nobody is left who could still write into a slot that is filled again.
"""

import contextlib
import itertools
import json
import mmap
import os
import signal
import socket
import traceback
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

from fastmae.clock import LOOK, RunClock
from fastmae.errors import DataError
from fastmae.fork import SIGNALS, fork, kill, readable, reap, uninterrupted

_IN_FLIGHT = 128  # tasks in the socket; its buffer holds some 270 small messages
_MESSAGE = 1 << 18  # bytes, more than a socket's buffer lets through
_LOOK = 2.0  # seconds between a waiting worker's looks at whether its parent is still there


class Death(NamedTuple):
    """A worker that ended by itself."""

    worker: int
    pid: int
    cause: int
    """The signal that killed it, or minus its exit code."""
    sample: int
    """The sample it was at, or -1."""

    @property
    def is_crash(self) -> bool:
        """Whether the worker's own code brought it down, and not somebody's ``kill`` or the lack of memory."""
        return self.cause in (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGILL, signal.SIGFPE)

    @property
    def how(self) -> str:
        """What happened to it, for people."""
        why = ", probably because memory ran out" if self.cause == signal.SIGKILL else ""
        return f"killed by {signal.Signals(self.cause).name}{why}" if self.cause > 0 else f"gone with exit code {-self.cause}"


class WorkerPool:
    """``workers`` processes that run ``work(task, at)``, or this process itself when there are none.

    Tasks and replies are plain JSON. ``work`` calls ``at(sample)`` before each sample, so that a death can be named. A
    DataError that it raises is raised here, any other error as RuntimeError with the worker's traceback.
    """

    def __init__(self, work: Callable[[list, Callable[[int], None]], Any], workers: int):
        self._work, self._count = work, workers
        self._numbers = itertools.count()
        self._waiting: deque[int] = deque()
        self._open: dict[int, list] = {}
        self._in_flight = 0
        self._at = np.frombuffer(mmap.mmap(-1, 8 * max(workers, 1)), np.int64)
        # A pipe that ends with a process -> its pid, in the order of the workers.
        self._processes: dict[int, int] = {}
        self._sockets: list[socket.socket] = []
        self._finalizer = weakref.finalize(self, _end, os.getpid(), self._processes, self._sockets)
        if workers:
            self._start()

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers."""
        return list(self._processes.values())

    def submit(self, task: list) -> None:
        """Have ``task`` done, after those submitted before."""
        number = next(self._numbers)
        self._open[number] = task
        self._waiting.append(number)
        self._send()

    def collect(self, timeout: float) -> tuple[list[tuple[list, Any]], list[Death]]:
        """Wait for something to happen: tasks done with their replies, and workers that died, both perhaps none.

        ``timeout`` in seconds, without those in which the process was suspended; 0 only looks. After a death all workers are
        gone, until ``revive``.
        """
        if not self._count:
            number = self._waiting.popleft() if self._waiting else None
            return ([] if number is None else [self._finish(number, *self._run(self._open[number], 0))]), []
        clock = RunClock()
        while True:
            left = max(0.0, timeout - clock.read())
            ready = readable([self._results.fileno(), *self._processes], min(left, LOOK))
            done, deaths = self._drain(), []
            if dead := ready & self._processes.keys():
                deaths = self._end_all(dead)
                done += self._drain()
                self._close_sockets()
            self._send()
            if done or deaths or clock.read() >= timeout:
                return done, deaths

    def revive(self) -> None:
        """New workers for those that died, and for what they left undone."""
        self._waiting = deque(sorted(self._open))  # numbers are in the order of submission
        self._start()
        self._send()

    def whereabouts(self) -> list[tuple[int, int]]:
        """(pid, sample it is at or -1) of each worker."""
        return list(zip(self.pids, self._at.tolist(), strict=False))

    def close(self) -> None:
        """End the workers, also one that is stuck."""
        self._finalizer()

    def _send(self) -> None:
        while self._processes and self._waiting and self._in_flight < _IN_FLIGHT:
            number = self._waiting[0]
            try:
                self._tasks.send(json.dumps([number, self._open[number]]).encode())
            except ConnectionError:  # no worker is left; ``collect`` will tell
                return
            self._waiting.popleft()
            self._in_flight += 1

    def _drain(self) -> list[tuple[list, Any]]:
        done = []
        with contextlib.suppress(BlockingIOError):
            while message := self._results.recv(_MESSAGE, socket.MSG_DONTWAIT):  # empty when no worker is left
                self._in_flight -= 1
                done.append(self._finish(*json.loads(message)))
        return done

    def _finish(self, number: int, reply: Any, data_error: str | None, crash: str | None) -> tuple[list, Any]:
        task = self._open.pop(number)
        if data_error is not None:
            raise DataError(data_error)
        if crash is not None:
            raise RuntimeError(f"a loader worker failed:\n{crash}")
        return task, reply

    def _run(self, task: list, worker: int) -> tuple[Any, str | None, str | None]:
        def at(sample: int) -> None:
            self._at[worker] = sample

        try:
            return self._work(task, at), None, None
        except DataError as error:
            return None, str(error), None
        except Exception:  # whatever it is, the training process must hear of it
            return None, None, traceback.format_exc()
        finally:
            at(-1)

    def _start(self) -> None:
        self._tasks, tasks = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._results, results = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._sockets += (self._tasks, self._results)
        self._in_flight = 0
        self._at[:] = -1
        parent = os.getpid()
        with uninterrupted():
            for worker in range(self._count):
                end, kept = os.pipe()
                pid = fork()
                if pid == 0:
                    try:
                        self._serve(worker, parent, tasks, results)
                    finally:
                        os._exit(1)
                os.close(kept)  # now the worker alone holds it
                self._processes[end] = pid
        tasks.close()
        results.close()

    def _serve(self, worker: int, parent: int, tasks: socket.socket, results: socket.socket) -> None:
        """The life of a worker."""
        # A signal to the whole process group is for the training process: it saves, and ends its workers itself.
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        torch.set_num_threads(1)
        self._close_sockets()
        tasks.settimeout(_LOOK)
        while os.getppid() == parent:
            try:
                message = tasks.recv(_MESSAGE)
            except TimeoutError:
                continue
            except OSError:
                break
            if not message:
                break
            number, task = json.loads(message)
            reply = json.dumps([number, *self._run(task, worker)], ensure_ascii=False).encode(errors="surrogatepass")
            try:
                results.send(reply)
            except OSError:  # the parent is gone
                break
        os._exit(0)

    def _end_all(self, dead: set[int]) -> list[Death]:
        """End every worker; return those that ended by themselves, whose pipes ``dead`` names or that are found so."""
        deaths = []
        for worker, (handle, pid) in enumerate(self._processes.items()):
            status = reap(pid, 0 if handle in dead else os.WNOHANG)
            if status is not None:
                deaths.append(Death(worker, pid, -status, int(self._at[worker])))
            else:
                kill([pid])
            os.close(handle)
        self._processes.clear()
        return deaths

    def _close_sockets(self) -> None:
        for end in self._sockets:
            end.close()
        self._sockets.clear()


def _end(owner: int, processes: dict[int, int], sockets: list[socket.socket]) -> None:
    if os.getpid() != owner:  # a fork of the training process, in which this object is a mere copy
        return
    kill(list(processes.values()))
    for handle in processes:
        os.close(handle)
    processes.clear()
    for end in sockets:
        end.close()
    sockets.clear()
