"""The processes of a run, forked from one that has imported everything, so that they begin at once; no launcher watches them.

Each has torchrun's variables, a process group of its own, and a console of its own; their exit codes are seen one by one. What
a test wants to go wrong is a function that each process calls before it begins, given its rank.
"""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

from tests.support.forked import context
from tests.support.runs import FLAGS

# Smaller than tiny, so that a step takes milliseconds.
SMALLEST = {"embed_dim": 24, "depth": 2, "num_heads": 3, "decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2}
BATCH = 12  # images per step, over all processes: of 1, 2, 3 or 4


_ONE_AT_A_TIME = threading.Lock()
"""Held while a process is started or looked at: multiprocessing looks at all of them then, and each may be asked once."""


class Crew:
    """``size`` processes of the run ``flags``. Used with ``with``: none outlives it."""

    def __init__(self, size: int, data: Path, out: Path, *flags, fault: Callable[[int], None] | None = None,
                 local: int | None = None, command: str = "pretrain"):  # fmt: skip
        """``local``: processes that think themselves on one machine, by default all. ``command``: pretrain, or one that takes
        its flags."""
        self.out, self.console = Path(out), Path(out).with_name(f"{Path(out).name}.console")
        self.console.mkdir(parents=True, exist_ok=True)
        batch_size = [] if "--batch-size" in flags else ["--batch-size", BATCH // size]
        words = [command, "tiny", *FLAGS, "--effective-batch", BATCH, "--data", data, "--out", out, *batch_size, *flags]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.number = len(list(self.console.glob("rank-0.*")))
        self.processes = [
            context().Process(
                target=_process, args=(rank, size, local or size, port, [str(w) for w in words], self._path(rank), fault)
            )
            for rank in range(size)
        ]
        for process in self.processes:
            with _ONE_AT_A_TIME:
                process.start()

    def __enter__(self) -> "Crew":
        return self

    def __exit__(self, *_) -> None:
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            with _ONE_AT_A_TIME:
                process.kill()
            while self._code(process) is None:
                time.sleep(0.01)

    def send(self, number: int, *ranks: int, group: bool = False) -> float:
        """Send a signal to ``ranks``, or to all; ``group``: to their loader's workers too. Returns the time."""
        for rank in ranks or range(len(self.processes)):
            with contextlib.suppress(ProcessLookupError):
                (os.killpg if group else os.kill)(self.processes[rank].pid, number)
        return time.monotonic()

    def end(self, timeout: float = 120, ranks: tuple[int, ...] = ()) -> list[int]:
        """Wait for ``ranks``, or all; their exit codes, minus the signal for those that were killed."""
        until = time.monotonic() + timeout
        waited = [self.processes[r] for r in ranks or range(len(self.processes))]
        while (codes := [self._code(process) for process in waited]).count(None):
            assert time.monotonic() < until, f"still there after {timeout} s\n{self.text()}"
            time.sleep(0.01)
        return codes

    def text(self, *ranks: int) -> str:
        """What ``ranks``, or all, have said."""
        return "".join(self._path(r).read_text(errors="replace") for r in ranks or range(len(self.processes))
                       if self._path(r).exists())  # fmt: skip

    def wait_for(self, what: str | Callable[[], bool], seconds: float = 60) -> None:
        """Until the processes have said ``what``, or it holds."""
        end = time.monotonic() + seconds
        while not (what in self.text() if isinstance(what, str) else what()):
            assert any(self._code(p) is None for p in self.processes), f"ended before {what}\n{self.text()}"
            assert time.monotonic() < end, f"{what} did not come\n{self.text()}"
            time.sleep(0.01)

    @staticmethod
    def _code(process) -> int | None:
        with _ONE_AT_A_TIME:
            return process.exitcode

    def _path(self, rank: int) -> Path:
        return self.console / f"rank-{rank}.{self.number}"


def run(size: int, data: Path, out: Path, *flags, **options) -> str:
    """A run that must end well; what it said."""
    with Crew(size, data, out, *flags, **options) as crew:
        assert crew.end() == [0] * size, crew.text()
        return crew.text()


def speak_into(console: Path) -> None:
    """Have what this process says written to a file."""
    handle = os.open(console, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for standard in (1, 2):
        os.dup2(handle, standard)


def _process(rank: int, size: int, local: int, port: int, words: list[str], console: Path,
             fault: Callable[[int], None] | None) -> None:  # fmt: skip
    os.setpgid(0, 0)
    speak_into(console)
    assert torch.get_num_threads() == 1  # or bits differ from those of a launcher's processes
    if size > 1:
        place = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank % local, "LOCAL_WORLD_SIZE": local, "MASTER_PORT": port}
        os.environ |= {name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"}

    if fault is not None:
        fault(rank)
    sys.exit(_main(words))


def _main(words: list[str]) -> int:
    from fastmae.model.config import PRESETS
    from fastmae.train.cli.main import main

    PRESETS["tiny"].update(SMALLEST)
    return main(words)


if __name__ == "__main__":  # for launchers: the same run as a program
    if "TESTS_SLOW_STEPS" in os.environ:
        from tests.support.faults import slow_steps

        slow_steps(float(os.environ["TESTS_SLOW_STEPS"]), 0)
    sys.exit(_main(sys.argv[1:]))
