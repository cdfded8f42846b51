"""Errors that a user can mend: the command line prints their text in one line and exits with their code."""


class InputError(ValueError):
    """Something given to fastmae is wrong. The message names it, what is allowed, and what to do. Exit code 2."""

    exit_code = 2


class DataError(InputError):
    """A shard, index, image or checkpoint is missing, damaged or not what it says; the message names path and place."""


class DivergedError(RuntimeError):
    """The loss or a gradient stayed non-finite; no such update was applied. Exit code 3."""

    exit_code = 3


class SampleError(ValueError):
    """One sample cannot be used, and the message says why. A loader names it and takes the next one instead."""
