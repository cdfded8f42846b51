"""Errors that a user can fix: the command line prints their message in one line and exits with their code."""

from collections.abc import Iterator


class InputError(ValueError):
    """Something given to fastmae is wrong. The message names it, what is allowed, and what to do. Exit code 2."""

    exit_code = 2


class DataError(InputError):
    """A shard, index, image or checkpoint is missing, damaged or inconsistent; the message names path and position."""


class WorkerError(DataError):
    """Worker processes died again and again; the message names the last, what killed it and at what."""


class SchemaError(DataError):
    """A checkpoint of another version of fastmae: not damaged, so it is neither skipped nor replaced."""


class DivergedError(RuntimeError):
    """The loss or a gradient stayed non-finite; no such update was applied. Exit code 3."""

    exit_code = 3


class LostProcessError(RuntimeError):
    """Another process of the run is gone, or the run makes no progress. Exit code 4."""

    exit_code = 4


class CheckpointError(RuntimeError):
    """Several consecutive checkpoints could not be written; the older ones are intact. Exit code 5."""

    exit_code = 5


class RequeueError(RuntimeError):
    """A run that was asked to stop has saved a checkpoint; resume it in another job. Exit code 85."""

    exit_code = 85


class SampleError(ValueError):
    """One sample cannot be used; the message gives the reason. A loader reports it and uses the next one."""


def chain(error: BaseException) -> Iterator[BaseException]:
    """``error`` and those behind it: its causes, its contexts, and what a compiler has wrapped in it."""
    found, waiting = [], [error]
    while waiting:
        error = waiting.pop(0)
        if isinstance(error, BaseException) and not any(error is e for e in found):
            found.append(error)
            yield error
            waiting += (error.__cause__, error.__context__, getattr(error, "inner_exception", None))  # the last: torch's
