"""A program that has a limit of time: its output goes to a file, and none of its processes outlives it."""

import contextlib
import json
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

_TAIL = 4000  # characters of output that a result holds; the log holds all of it
_STACKS = 5.0  # seconds in which Python writes the stacks of a program that hangs


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a program ended."""

    command: str
    status: str
    """ok, failed or timeout."""
    exit_code: int
    """Minus the number of the signal that ended it."""
    seconds: float
    log: Path
    """Everything that it wrote."""

    @property
    def text(self) -> str:
        """Everything that it wrote."""
        return self.log.read_text(errors="replace")

    @property
    def document(self) -> dict | None:
        """The last line that is a JSON document, as benchmarks end with; libraries may have written after it."""
        return self._split()[0]

    def to_json(self) -> dict[str, object]:
        """For an item's file, which has the document separately."""
        tail = self._split()[1][-_TAIL:]
        return {**asdict(self), "seconds": round(self.seconds, 1), "log": self.log.name, "tail": tail}

    def _split(self) -> tuple[dict | None, str]:
        """The document and all other text."""
        lines = self.text.strip().splitlines()
        for number in reversed(range(len(lines))):
            with contextlib.suppress(ValueError):
                if lines[number].startswith("{") and isinstance(found := json.loads(lines[number]), dict):
                    return found, "\n".join(lines[:number] + lines[number + 1 :])
        return None, "\n".join(lines)


def run(command: Sequence[str], *, limit: float, log: Path, environment: Mapping[str, str], folder: Path,
        meanwhile: Callable[[subprocess.Popen], None] | None = None, fine: Sequence[int] = (0,)) -> Outcome:  # fmt: skip
    """Run ``command`` in ``folder`` for at most ``limit`` seconds; ``meanwhile`` is called a few times a second. The exit codes
    of ``fine`` are ok.

    At the limit Python programs write the stacks of their threads (faulthandler, on SIGABRT); then the process group is
    killed, as it is when this is interrupted. The program stays in the session, with which a batch system ends all it started.
    """
    began = time.monotonic()
    status = "timeout"
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, cwd=folder,
                                   env={**environment, "PYTHONFAULTHANDLER": "1"}, process_group=0)  # fmt: skip
        try:
            while time.monotonic() - began < limit:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    status = "ok" if process.wait(0.2) in fine else "failed"
                    break
                if meanwhile:
                    meanwhile(process)
            else:
                process.send_signal(signal.SIGABRT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_STACKS)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return Outcome(command=_plain(command), status=status, exit_code=process.returncode, seconds=time.monotonic() - began,
                   log=log)  # fmt: skip


def _plain(command: Sequence[str]) -> str:
    """As a reader types it: no paths of this machine, which a result that is committed should not hold."""
    return shlex.join(Path(word).name if word.startswith("/") else word for word in command)
