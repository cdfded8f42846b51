"""Watches a run from a thread in each process: a step that does not end, and processes that are lost.

A process that makes no progress for its timeout writes the stacks of its threads, has all others write theirs, and ends. If a
call holds the GIL, so that not even its watch can run, ``watchdog.py`` has it write its stacks and kills it. Time in
which the process was suspended does not count.
"""

import faulthandler
import os
import socket
import sys
import threading
import time
from pathlib import Path

from fastmae.clock import RunClock
from fastmae.errors import LostProcessError
from fastmae.train.distributed.heartbeat import Heartbeat
from fastmae.train.distributed.watchdog import Watchdog
from fastmae.train.distributed.world import World

HANGS = "hangs"
WATCHED = 20 * 86400.0
"""Seconds that collectives may take where a watch ends those that hang: their own timers would count the time that a run was
suspended. The milliseconds fit 32 bits."""
_TICK = 1.0  # seconds between two checks
_LOST_AFTER = 30.0  # seconds without a heartbeat, in a run that otherwise continues
_LOST_AT_START = 120.0  # the same while libraries are loaded and models compiled, which may keep a process's threads waiting
_TO_END = 30.0  # seconds that a process has to end by itself once another has failed
_TO_FINISH = 3.0  # seconds that others have to write their stacks, or to read what rank 0 has published


class Watch:
    """The watch of one process. Report progress by ``beat``; without any it ends the process, exit code 4."""

    def __init__(self, world: World, out: Path, *, first: float, later: float):
        """``first`` and ``later``: seconds without progress in what may be slow, the first step above all, and elsewhere."""
        self.world, self.out, self.first, self.later = world, out, first, later
        self.heartbeat, self.clock, self._watchdog = Heartbeat(world), RunClock(), Watchdog()
        self.step, self.doing = 0, "starting"
        self._allowed = (first, 0.0)  # seconds, and since when; replaced together, as the thread may look at any moment
        self._has_written = self._has_stepped = False
        self._first_step: int | None = None
        self._ended = threading.Event()
        self._beat()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def beat(self, step: int, doing: str, slow: bool = False) -> None:
        """``step`` steps are done, and ``doing`` begins; ``slow``: it may take as long as the first step."""
        before, _ = self._allowed
        self._first_step = step if self._first_step is None else self._first_step
        self._has_stepped = step > self._first_step
        self.step, self.doing = step, doing
        self._allowed = (self.first if slow else self.later, self.clock.read())
        if self._allowed[0] < before:  # the watchdog knows of the longer one
            self._beat()

    def alive(self, doing: str) -> None:
        """Before the first step: ``doing`` makes progress, however long it takes."""
        self.doing, self._allowed = doing, (self._allowed[0], self.clock.read())

    def end(self) -> None:
        """Watch no more; this process continues, or ends, by itself."""
        self._ended.set()
        self._thread.join(timeout=10 * _TICK)
        self._watchdog.end()
        self.heartbeat.end()

    def _run(self) -> None:
        failed_at = None
        while not self._ended.wait(_TICK):
            self._beat()
            (timeout, since), now = self._allowed, self.clock.read()
            if now - since > timeout:
                self._abort(now - since)
            if requester := self.heartbeat.stacks_requested_by():
                self._write_stacks(f"{requester} makes no progress")
            if lost := self.heartbeat.lost(_LOST_AFTER if self._has_stepped else _LOST_AT_START):
                self._leave(f"{lost}, after step {self.step}; the others end")
            if failed := self.heartbeat.failed():
                failed_at = now if failed_at is None else failed_at
                if now - failed_at > _TO_END:  # in a collective that will not come to an end
                    self._leave(f"{failed}; the others end")

    def _beat(self) -> None:
        """The watchdog ends the process only if its watch cannot run for as long as a step may take."""
        self._watchdog.beat(self._allowed[0] + 5 * _TICK)

    def _abort(self, waited: float) -> None:
        reason = f"no progress for {waited:.0f} s after step {self.step}, {self.doing}"
        self.heartbeat.request_stacks()
        where = self._write_stacks(reason)
        self._leave(f"rank {self.world.rank}: {reason}; the stacks of its threads are {where}")

    def _write_stacks(self, reason: str) -> str:
        """Write them to a file and to the console, once; returns where they are."""
        path = self.out / HANGS / f"step-{self.step:07d}-rank-{self.world.rank}-process-{os.getpid()}.txt"
        if self._has_written:
            return f"in {path}"
        self._has_written = True
        head = f"rank {self.world.rank} on {socket.gethostname()}, process {os.getpid()}: {reason}\n"
        text, where = head + _stacks(), f"in {path}"
        try:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        except OSError as error:  # a full disk must not keep a hanging process alive
            where = f"above, {path} cannot be written, {error.strerror}"
        sys.stderr.write(text)
        return where

    def _leave(self, reason: str) -> None:
        sys.stderr.write(f"fastmae: {reason}\n")
        if self.world.size > 1:
            time.sleep(_TO_FINISH)
        os._exit(LostProcessError.exit_code)  # the main thread may hang for ever


def _stacks() -> str:
    """The stacks of all threads. Python writes them to files only, so to one in memory."""
    with os.fdopen(os.memfd_create("stacks"), "r+b") as file:
        faulthandler.dump_traceback(file)
        file.seek(0)
        return file.read().decode(errors="replace")
