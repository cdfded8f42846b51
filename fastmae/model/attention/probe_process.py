"""Try attention backends in a child process, which may crash or hang: the parent's side and the child's.

The child, a new interpreter because a GPU cannot be used after a fork, tries one (backend, shape) after the other and reports
when each begins and ends: the one that was running when the child ended has ended it. Another child continues with the rest.
Messages are lines of JSON after the control character RS (RFC 7464); output of libraries may come between them.
"""

import contextlib
import ctypes
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # imported by the child's program alone, below
    import torch

    from fastmae.model.attention.trial import Verdict

Pair = tuple[str, tuple[int | str, ...]]
"""A backend and a ``Shape``, or what else ``main``'s functions take."""
_MARK = "\x1e"
_START_TIMEOUT = 300.0  # seconds for a child to import torch, perhaps from a slow network disk, and to open the GPU
_TRIAL_TIMEOUT = 120.0  # seconds; the first trial of a backend may import or compile it
_EXIT_TIMEOUT = 10.0  # seconds for a killed child to end; one that hangs inside a driver may take longer
_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl(2)
_PROGRAM = ("-m", "fastmae.model.attention.probe_process")
_EXTERNAL = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # not a backend's fault: the OOM killer's, say


class ProbeError(RuntimeError):
    """No child process can be started or open the GPU; ``found`` is what earlier ones have found."""

    found: "dict[Pair, Verdict]"


def probe_in_child(device_type: str, index: int | None, dtype: "torch.dtype", pairs: list[Pair],
                   program: str | None = None) -> "dict[Pair, Verdict]":  # fmt: skip
    """The verdict on each of ``pairs``, tried on the device of number ``index``; a crash or hang is one too.

    ``program``: the module that the child runs, and calls ``main`` in; by default this one. Raises ProbeError if nothing can
    be tried.
    """
    found: dict[Pair, Verdict] = {}
    try:
        while rest := [pair for pair in pairs if pair not in found]:
            task = {"device": device_type, "index": index, "dtype": str(dtype).removeprefix("torch."), "pairs": rest}
            task |= {"program": ("-m", program) if program else _PROGRAM}
            found |= _results(task, rest)
    except ProbeError as error:
        error.found = found
        raise
    return found


def _results(task: dict, pairs: list[Pair]) -> "dict[Pair, Verdict]":
    """What one child finds until it ends or is killed; at least one verdict."""
    from fastmae.model.attention.trial import Verdict

    found: dict[Pair, Verdict] = {}
    current: Pair | None = None
    with _Child(task) as child:
        try:
            is_open = child.message(_START_TIMEOUT)
            if is_open is None or "closed" in is_open:
                raise ProbeError(is_open["closed"] if is_open else child.ending())
            while message := child.message(_TRIAL_TIMEOUT):
                pair = pairs[message.get("begin", message.get("end"))]
                current = pair if "begin" in message else None
                if current is None:
                    found[pair] = Verdict(message["reason"], message["lasts"])
        except TimeoutError:
            if current is None and found:  # a lost GPU does not even raise
                return found
            if current is None:
                raise ProbeError(f"the probe process did not start within {_START_TIMEOUT:.0f} s") from None
            # Its other shapes would hang too.
            hung = Verdict(f"timed out after {_TRIAL_TIMEOUT:.0f} s", lasts=False)
            return found | {p: hung for p in pairs if p[0] == current[0] and p not in found}
        if current is not None:
            found[current] = Verdict(f"crashed: {child.ending()}", lasts=child.code() not in [-s for s in _EXTERNAL])
        if not found:
            raise ProbeError(child.ending())
    return found


class _Child:
    """A running child. As a context: it and all that it has started are killed at the end."""

    def __init__(self, task: dict):
        self._rest, self._last = b"", ""
        path = os.pathsep.join(os.path.abspath(p) for p in sys.path)  # noqa: PTH100 - "" is the current folder
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", *task.get("program", _PROGRAM), json.dumps({**task, "parent": os.getpid()})],
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONPATH": path},
                start_new_session=True,  # Ctrl-C must not reach it
            )  # fmt: skip
        except OSError as error:
            raise ProbeError(f"the probe process cannot be started, {error}") from error

    def __enter__(self) -> "_Child":
        return self

    def __exit__(self, *_) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_EXIT_TIMEOUT)
        self._process.stdout.close()

    def message(self, seconds: float) -> dict | None:
        """Its next message; None once it has ended. Raises TimeoutError if neither comes within ``seconds``."""
        until = time.monotonic() + seconds
        while (line := self._line(until)) is not None:
            if line.startswith(_MARK):
                self._last = ""  # output of another trial
                return json.loads(line[1:])
            self._last = line.strip() or self._last
        self._last = self._rest.decode(errors="replace").strip() or self._last
        return None

    def code(self) -> int | None:
        """Its exit code, or minus the signal that ended it; None if it does not end."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._process.wait(_EXIT_TIMEOUT)
        return None

    def ending(self) -> str:
        """How it ended, with its last output, in one line."""
        code = self.code()
        how = signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"
        return f"the probe process ended with {how}{', ' if self._last else ''}{self._last[:200]}"

    def _line(self, until: float) -> str | None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._rest:
                if not selector.select(max(0.0, until - time.monotonic())):
                    raise TimeoutError
                if not (data := os.read(self._process.stdout.fileno(), 1 << 16)):
                    return None
                self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        return line.decode(errors="replace")


def main(task: dict, open_device: Callable[[str, int | None], None], try_out: "Callable[..., Verdict]",
         answers: Callable[[str], bool]) -> int:  # fmt: skip
    """The child: try the pairs of ``task`` by the functions of ``trial.py``, until the device does not compute any more."""
    ctypes.CDLL(None).prctl(_DEATH_SIGNAL, signal.SIGKILL)  # a hanging kernel must not outlive the parent and keep the GPU
    if os.getppid() != task["parent"]:
        return 1
    device, pairs = task["device"], task["pairs"]
    try:
        open_device(device, task["index"])
    except Exception as error:  # in use by another process, out of memory, or lost
        _send(closed=f"the probe process cannot open the GPU, {type(error).__name__}: {str(error).partition(chr(10))[0]}")
        return 1
    _send(opened=True)
    for number, (backend, shape) in enumerate(pairs):
        _send(begin=number)
        verdict = try_out(backend, device, task["dtype"], shape)
        _send(end=number, **verdict._asdict())
        if verdict.reason is not None and not answers(device):
            return 1
    return 0


def _send(**message) -> None:
    print(f"\n{_MARK}{json.dumps(message)}", flush=True)


if __name__ == "__main__":
    import torch

    from fastmae.model.attention.backends import Shape
    from fastmae.model.attention.trial import answers, open_device, try_out

    sys.exit(main(json.loads(sys.argv[1]), open_device,
                  lambda backend, device, dtype, shape: try_out(backend, device, getattr(torch, dtype), Shape(*shape)),
                  answers))  # fmt: skip
