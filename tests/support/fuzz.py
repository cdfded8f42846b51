"""Damaged files by the hundred: how many, damaged how, and how much memory each may cost."""

import ctypes
import re
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

every_draw = pytest.mark.parametrize("draw", [0, *(pytest.param(draw, marks=pytest.mark.all) for draw in range(1, 8))])
"""Give a fuzz test the argument ``draw``: one is enough for every change, and eight find what is rare."""
_SPECIAL = [bytes(512), b"\xff" * 12, b"7" * 11, b"L", b"x", b"g", b"S", b"12 size=999\n", b"11 path=../"]
NEW = st.one_of(st.binary(min_size=1, max_size=20), st.sampled_from(_SPECIAL))
_PLACE = st.floats(0, 1, exclude_max=True)
MUTATION = st.tuples(st.sampled_from(["flip", "cut", "insert", "splice", "random"]), _PLACE, _PLACE, NEW)


def fuzz(draw: int, *strategies, examples: int = 313):
    """Call the decorated function at once, with ``examples`` of ``strategies``: others for each ``draw``, equal in each run."""

    def call(function):
        bounds = settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        seed(draw)(bounds(given(*strategies)(function)))()

    return call


def mutate(data: bytes, mutations) -> bytes:
    """``data`` with bytes flipped, cut out, put in, moved or overwritten."""
    for kind, first, second, new in mutations:
        at, other = (int(place * (len(data) + 1)) for place in (first, second))
        low, high = sorted((at, other))
        if kind == "flip" and at < len(data):
            data = put(data, at, bytes([data[at] ^ (new[0] or 1)]))
        elif kind == "cut":
            data = data[:low] + data[low + len(new) :] if len(new) > 3 else data[:at]
        elif kind == "insert":
            data = data[:at] + new + data[at:]
        elif kind == "splice":
            data = data[:low] + data[high:] if new[0] % 2 else data[:high] + data[low:]
        elif kind == "random":
            data = put(data, at, new)
    return data


def put(data: bytes, at: int, new: bytes) -> bytes:
    """``data`` with ``new`` over what stands at ``at``."""
    return data[:at] + new + data[at + len(new) :]


@contextmanager
def bounded_memory(limit: int):
    """The process's resident memory may at no moment be ``limit`` bytes above what it is now.

    For one example, not for a run of them: what Hypothesis and the allocator keep of thousands would count too.
    """

    def peak() -> int:
        return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) << 10

    ctypes.CDLL(None).malloc_trim(0)  # or what it holds in stock could be taken unseen
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to what is resident now
    before = peak()
    yield
    taken = peak() - before
    assert taken < limit, f"{taken} bytes, at most {limit}"
