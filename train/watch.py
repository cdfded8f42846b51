"""Watches a run from a thread in each process: a step that does not end, and processes that are gone.

A process that makes no progress for its timeout writes the stacks of its threads, has all others write theirs, and ends. Should
one hold Python's interpreter, so that not even its watch can run, the system's timer ends it and prints its stacks.
"""

import contextlib
import faulthandler
import os
import socket
import sys
import threading
import time
from pathlib import Path

from fastmae.errors import LostProcessError
from fastmae.train.vitals import Vitals
from fastmae.train.world import World

HANGS = "hangs"
_TICK = 1.0  # seconds between two looks
_LOST_AFTER = 30.0  # seconds without a sign of life, in a run that otherwise goes on
_LOST_AT_START = 120.0  # the same while libraries are loaded and models compiled, which may keep a process's threads waiting
_PAUSE = 5.0  # seconds between two looks that tell that this process itself was stopped for a while
_TO_END = 30.0  # seconds that a process has to end by itself once another has failed
_TO_FINISH = 3.0  # seconds that others have to write their stacks, or to read what the main process says


class Watch:
    """The watch of one process. Tell it of progress by ``beat``; without any it ends the process, exit code 4."""

    def __init__(self, world: World, out: Path, *, first: float, later: float):
        """``first`` and ``later``: seconds without progress in what may be slow, the first step above all, and elsewhere."""
        self.world, self.out, self.first, self.later = world, out, first, later
        self.vitals = Vitals(world)
        self.step, self.doing = 0, "starting"
        self._patience, self._since = first, time.monotonic()
        self._has_written = self._has_stepped = False
        self._first_step: int | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def beat(self, step: int, doing: str, slow: bool = False) -> None:
        """``step`` steps are done, and ``doing`` begins; ``slow``: it may take as long as the first step."""
        before = self._patience
        self._first_step = step if self._first_step is None else self._first_step
        self._has_stepped = step > self._first_step
        self.step, self.doing = step, doing
        self._patience, self._since = self.first if slow else self.later, time.monotonic()
        if self._patience < before:  # the timer was set for longer
            self._set_timer()

    def alive(self, doing: str) -> None:
        """Before the first step: ``doing`` makes progress, however long it takes."""
        self.doing, self._since = doing, time.monotonic()

    def end(self) -> None:
        """Watch no more; this process goes on, or ends, by itself."""
        self._ended.set()
        self._thread.join(timeout=10 * _TICK)
        faulthandler.cancel_dump_traceback_later()
        self.vitals.end()

    def _run(self) -> None:
        looked, heard_at = time.monotonic(), None
        while not self._ended.wait(_TICK):
            self._set_timer()
            looked, before = time.monotonic(), looked
            if looked - before > _PAUSE:  # stopped as a whole, and going on: that is no hang
                self._since += looked - before
                self.vitals.forgive()
            if looked - self._since > self._patience:
                self._abort(looked - self._since)
            if asking := self.vitals.who_asks_for_stacks():
                self._write_stacks(f"{asking} makes no progress")
            if lost := self.vitals.lost(_LOST_AFTER if self._has_stepped else _LOST_AT_START):
                self._leave(f"{lost}, after step {self.step}; the others end")
            if failed := self.vitals.failed():
                heard_at = looked if heard_at is None else heard_at
                if looked - heard_at > _TO_END:  # in a collective that will not come to an end
                    self._leave(f"{failed}; the others end")

    def _set_timer(self) -> None:
        """The system's, which goes off only if the watch cannot run for so long, and so not set it anew."""
        faulthandler.dump_traceback_later(self._patience + 5 * _TICK, exit=True, file=sys.__stderr__)

    def _abort(self, waited: float) -> None:
        reason = f"no progress for {waited:.0f} s after step {self.step}, {self.doing}"
        self.vitals.ask_for_stacks()
        where = self._write_stacks(reason)
        self._leave(f"rank {self.world.rank}: {reason}; the stacks of its threads are {where}")

    def _write_stacks(self, reason: str) -> str:
        """Write them to a file and to the console, once; say where they are."""
        path = self.out / HANGS / f"step-{self.step:07d}-rank-{self.world.rank}-process-{os.getpid()}.txt"
        if self._has_written:
            return f"in {path}"
        self._has_written = True
        head = f"rank {self.world.rank} on {socket.gethostname()}, process {os.getpid()}: {reason}\n"
        with contextlib.suppress(OSError):  # nobody reads any more
            sys.__stderr__.write(head)
            sys.__stderr__.flush()
            faulthandler.dump_traceback(sys.__stderr__)
        try:
            path.parent.mkdir(exist_ok=True)
            with path.open("w") as file:
                file.write(head)
                file.flush()
                faulthandler.dump_traceback(file)
        except OSError as error:  # a full disk must not keep a process that hangs
            return f"above, {path} cannot be written, {error.strerror}"
        return f"in {path}"

    def _leave(self, reason: str) -> None:
        with contextlib.suppress(OSError):
            sys.__stderr__.write(f"fastmae: {reason}\n")
            sys.__stderr__.flush()
        if self.world.size > 1:
            time.sleep(_TO_FINISH)
        os._exit(LostProcessError.exit_code)  # the main thread may hang for ever
