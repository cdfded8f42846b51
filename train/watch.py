"""Watches a run from a thread in each process: a step that does not end, and processes that are gone.

A process that makes no progress for its timeout writes the stacks of its threads, has all others write theirs, and ends. Should
one hold Python's interpreter, so that not even its watch can run, the system's timer ends it and prints its stacks.
"""

import faulthandler
import os
import socket
import sys
import threading
import time
from pathlib import Path

from fastmae.errors import LostProcessError
from fastmae.files import make_folder
from fastmae.train.vitals import Vitals
from fastmae.train.world import World

HANGS = "hangs"
_TICK = 1.0  # seconds between two looks
_LOST_AFTER = 30.0  # seconds without a sign of life, in a run that otherwise goes on
_TO_FINISH = 3.0  # seconds that others have to write their stacks, or to read what the main process says


class Watch:
    """The watch of one process. Tell it of progress by ``beat``; without any it ends the process, exit code 4."""

    def __init__(self, world: World, out: Path, *, first: float, later: float):
        """``first`` and ``later``: seconds without progress in what may be slow, the first step above all, and elsewhere."""
        self.world, self.out, self.first, self.later = world, out, first, later
        self.vitals = Vitals(world)
        self.step, self.doing = 0, "starting"
        self._patience, self._since = first, time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def beat(self, step: int, doing: str, slow: bool = False) -> None:
        """``step`` steps are done, and ``doing`` begins; ``slow``: it may take as long as the first step."""
        self.step, self.doing = step, doing
        self._patience, self._since = self.first if slow else self.later, time.monotonic()

    def end(self) -> None:
        """Watch no more; this process goes on, or ends, by itself."""
        self._ended.set()
        self._thread.join(timeout=10 * _TICK)
        faulthandler.cancel_dump_traceback_later()
        self.vitals.take_leave()

    def _run(self) -> None:
        while not self._ended.wait(_TICK):
            # Goes off only if this thread cannot run for so long: armed anew each time that it can.
            faulthandler.dump_traceback_later(self._patience + 5 * _TICK, exit=True, file=sys.__stderr__)
            self.vitals.give_sign()
            waited = time.monotonic() - self._since
            if waited > self._patience:
                self._abort(waited)
            if asking := self.vitals.who_asks_for_stacks():
                self._write_stacks(f"{asking} makes no progress")
            if lost := self.vitals.lost(_LOST_AFTER):
                self._leave(f"{lost} of this run gives no sign of life, after step {self.step}; the others end")

    def _abort(self, waited: float) -> None:
        reason = f"no progress for {waited:.0f} s after step {self.step}, {self.doing}"
        self.vitals.ask_for_stacks()
        self._write_stacks(reason)
        self._leave(f"rank {self.world.rank}: {reason}; the stacks of its threads are in {self.out / HANGS}")

    def _write_stacks(self, reason: str) -> None:
        path = self.out / HANGS / f"step-{self.step:07d}-rank-{self.world.rank}.txt"
        if path.exists():
            return
        make_folder(path.parent)
        with path.open("w") as file:
            file.write(f"rank {self.world.rank} on {socket.gethostname()}, process {os.getpid()}: {reason}\n")
            file.flush()
            faulthandler.dump_traceback(file)
        sys.__stderr__.write(path.read_text())
        sys.__stderr__.flush()

    def _leave(self, reason: str) -> None:
        sys.__stderr__.write(f"fastmae: {reason}\n")
        sys.__stderr__.flush()
        if self.world.size > 1:
            time.sleep(_TO_FINISH)
        os._exit(LostProcessError.exit_code)  # the main thread may hang for ever
