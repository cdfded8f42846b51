"""The bound on memory, on which other tests rely."""

import gc

import pytest

from tests.support.fuzz import bounded_memory


def test_memory_that_is_taken_and_given_back_is_seen():
    gc.collect()  # or what earlier tests of this process have left might be freed inside, and hide what is taken
    with bounded_memory(10 << 20):
        bytearray(b"x") * (5 << 20)
    for _ in range(3):  # the allocator has stocked what the one before gave back
        with pytest.raises(AssertionError), bounded_memory(10 << 20):
            bytearray(b"x") * (100 << 20)
