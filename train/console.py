"""The console: standard input, output and error of a program, which may be closed, full, lost, unread, or speak ASCII alone.

Work that ends in a file outlives its console: what cannot be written is dropped. A program whose output is its result ends
without it, quietly if its reader has gone, as Unix programs do by SIGPIPE. Standard error never ends a program.
"""

import contextlib
import io
import os
import select
import signal
import sys
from collections.abc import Iterator
from typing import TextIO

_NAMES = {1: "standard output", 2: "standard error"}
_PIECE = select.PIPE_BUF  # bytes that a pipe takes without waiting, once it takes any
_READER_TIMEOUT = 10.0  # seconds for a reader that does not read; afterwards none until it reads again
_LOST: dict[str, str] = {}


def lost() -> dict[str, str]:
    """The streams of this program that could not be written, with the first reason."""
    return dict(_LOST)


def report(text: str) -> None:
    """One line for people on standard error, from any process."""
    print(f"fastmae: {text}", file=sys.stderr, flush=True)


def open_streams() -> None:
    """At a program's start: closed streams lead to /dev/null, and the two that are written drop, or raise, as described above.

    A closed one's number would be given to the next file that is opened, such as a checkpoint, and prints would go into it.
    Streams that the calling program has replaced stay as they are.
    """
    if sys.stdin is None:
        sys.stdin = os.fdopen(_open_null(0), closefd=False)
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is getattr(sys, f"__{name}__"):
            setattr(sys, name, _wrap(stream, number))


@contextlib.contextmanager
def outlived() -> Iterator[None]:
    """A block that continues whatever becomes of standard output; what it has printed is written, or dropped, at its end."""
    before = sys.stdout, sys.stderr
    open_streams()
    output = _output()
    was_needed = output is not None and output.is_needed
    if output is not None:
        output.is_needed = False
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        if output is not None:
            output.is_needed = was_needed
        sys.stdout, sys.stderr = before


@contextlib.contextmanager
def flushed() -> Iterator[None]:
    """A block whose output is written at its end, not while the interpreter ends. Raises OSError if it cannot be."""
    try:
        yield
    finally:
        sys.stdout.flush()
        if (output := _output()) and output.error:
            raise output.error  # argparse, for one, has caught it


class _Stream(io.RawIOBase):
    """What is below the text stream of standard output or standard error."""

    def __init__(self, handle: int, number: int):
        self.handle, self.number, self.name = handle, number, f"<{_NAMES[number]}>"
        self.is_needed = number == 1
        """Whether the program ends if it cannot write."""
        self.error: OSError | None = None
        """Why it could not, where the program needs it."""
        self._is_stuck = False

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self.handle

    def isatty(self) -> bool:
        return os.isatty(self.handle)

    def write(self, data: bytes) -> int:
        """Write all of ``data``, or drop it."""
        rest = memoryview(data)
        try:
            while rest:
                self._wait()
                rest = rest[os.write(self.handle, rest[:_PIECE]) :]
        except OSError as error:
            self._lose(error)
        return len(data)

    def _wait(self) -> None:
        """Until it can be written. Raises TimeoutError if nobody reads, unless the program is for that reader."""
        poll = select.poll()
        poll.register(self.handle, select.POLLOUT)
        timeout = None if self.is_needed else 0 if self._is_stuck else _READER_TIMEOUT * 1000
        self._is_stuck = not poll.poll(timeout)
        if self._is_stuck:
            raise TimeoutError(None, "nobody reads it")

    def _lose(self, error: OSError) -> None:
        name, reason = _NAMES[self.number], error.strerror or str(error)
        is_first = name not in _LOST
        _LOST.setdefault(name, reason)
        if self.is_needed:
            self.is_needed = False  # or its end would meet the same error once more
            if isinstance(error, BrokenPipeError):
                raise SystemExit(128 + signal.SIGPIPE)
            self.error = OSError(error.errno, error.strerror, name)
            raise self.error
        if is_first and self.number == 1:
            report(f"{name} cannot be written, {reason}; continues without it")


def _output() -> _Stream | None:
    """What is below standard output, unless the calling program has replaced it."""
    below = getattr(sys.stdout, "buffer", None)
    return below if isinstance(below, _Stream) else None


def _wrap(stream: TextIO | None, number: int) -> TextIO:
    """A text stream in place of ``stream``, None if it was closed when Python began."""
    if stream is None:
        return io.TextIOWrapper(_Stream(_open_null(number), number), "utf-8", "backslashreplace", line_buffering=True)
    with contextlib.suppress(OSError):
        stream.flush()
    # Names that the console's encoding lacks are written in escapes.
    errors = "backslashreplace" if stream.errors in ("strict", "surrogateescape") else stream.errors
    return io.TextIOWrapper(_Stream(stream.fileno(), number), stream.encoding, errors, line_buffering=stream.line_buffering,
                            write_through=stream.write_through)  # fmt: skip


def _open_null(number: int) -> int:
    """/dev/null, as ``number`` if that is free."""
    handle = os.open(os.devnull, os.O_RDWR)
    if handle == number:
        os.set_inheritable(handle, True)  # children have it closed otherwise
    return handle
