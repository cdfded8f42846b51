"""Shared memory: written by one process, read by another, and free again when nobody looks at it."""

import os
import weakref
from pathlib import Path

import numpy as np

from fastmae.data.shared_memory import Buffers, Field

FIELDS = {"ids": Field("<i8", (5,)), "images": Field("|u1", (5, 7)), "flips": Field("|b1", (5,))}


def test_arrays_of_all_slots_are_apart():
    buffers = Buffers(FIELDS)
    numbers = [buffers.take() for _ in range(4)]
    assert len(set(numbers)) == 4
    for value, buffer in enumerate(numbers):
        for name, field in FIELDS.items():
            array = buffers.array(buffer, name)
            assert array.shape == field.shape and array.dtype == np.dtype(field.dtype)
            array[:] = value + 1
    for value, buffer in enumerate(numbers):
        for name in FIELDS:
            assert (buffers.array(buffer, name) == (1 if name == "flips" else value + 1)).all()


def test_what_a_child_writes_the_parent_reads_also_in_slots_made_after_the_fork():
    buffers = Buffers(FIELDS)
    buffers.take()
    readable, writable = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.read(readable, 1)
        buffers.array(1, "images")[:] = 42
        os._exit(0)
    buffer = buffers.take()
    os.write(writable, b"x")
    os.waitpid(pid, 0)
    os.close(readable)
    os.close(writable)
    assert buffer == 1 and (buffers.array(buffer, "images") == 42).all()


def test_a_fork_inherits_no_mapping_and_writes_slots_that_its_parent_has_mapped():
    buffers = Buffers(FIELDS)
    numbers = [buffers.take() for _ in range(3)]
    for buffer in numbers:
        buffers.array(buffer, "images")[:] = 1
    pid = os.fork()
    if pid == 0:
        is_inherited = "fastmae-batches" in Path("/proc/self/maps").read_text()
        for buffer in numbers:  # would crash, if it took the parent's mapping for its own
            buffers.array(buffer, "images")[:] += 1 + buffer
        os._exit(int(is_inherited))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert [buffers.array(buffer, "images").min() for buffer in numbers] == [2 + buffer for buffer in numbers]


def test_a_slot_given_back_is_taken_again():
    buffers = Buffers(FIELDS)
    one, two = buffers.take(), buffers.take()
    buffers.give(one)
    assert buffers.take() == one and buffers.take() not in (one, two)


def test_the_memory_is_gone_with_the_buffers():
    buffers = Buffers(FIELDS)
    buffers.array(buffers.take(), "ids")[:] = 1
    before = sum(1 for _ in Path("/proc/self/fd").iterdir())
    gone = weakref.ref(buffers)
    del buffers
    assert gone() is None and sum(1 for _ in Path("/proc/self/fd").iterdir()) < before
