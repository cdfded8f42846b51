"""Shared memory: written by one process, read by another, and free again when nobody looks at it."""

import os
import weakref
from pathlib import Path

import numpy as np

from fastmae.data.shared_memory import Field, Slots

FIELDS = {"ids": Field("<i8", (5,)), "images": Field("|u1", (5, 7)), "flips": Field("|b1", (5,))}


def test_arrays_of_all_slots_are_apart():
    slots = Slots(FIELDS)
    numbers = [slots.take() for _ in range(4)]
    assert len(set(numbers)) == 4
    for value, slot in enumerate(numbers):
        for name, field in FIELDS.items():
            array = slots.array(slot, name)
            assert array.shape == field.shape and array.dtype == np.dtype(field.dtype)
            array[:] = value + 1
    for value, slot in enumerate(numbers):
        assert all((slots.array(slot, name) == bool(1) if name == "flips" else slots.array(slot, name) == value + 1).all()
                   for name in FIELDS)  # fmt: skip


def test_what_a_child_writes_the_parent_reads_also_in_slots_made_after_the_fork():
    slots = Slots(FIELDS)
    slots.take()
    readable, writable = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.read(readable, 1)
        slots.array(1, "images")[:] = 42
        os._exit(0)
    slot = slots.take()
    os.write(writable, b"x")
    os.waitpid(pid, 0)
    os.close(readable)
    os.close(writable)
    assert slot == 1 and (slots.array(slot, "images") == 42).all()


def test_a_fork_inherits_no_mapping_and_writes_slots_that_its_parent_has_mapped():
    slots = Slots(FIELDS)
    numbers = [slots.take() for _ in range(3)]
    for slot in numbers:
        slots.array(slot, "images")[:] = 1
    pid = os.fork()
    if pid == 0:
        is_inherited = "fastmae-batches" in Path("/proc/self/maps").read_text()
        for slot in numbers:  # would crash, if it took the parent's mapping for its own
            slots.array(slot, "images")[:] += 1 + slot
        os._exit(int(is_inherited))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert [slots.array(slot, "images").min() for slot in numbers] == [2 + slot for slot in numbers]


def test_a_slot_given_back_is_taken_again():
    slots = Slots(FIELDS)
    one, two = slots.take(), slots.take()
    slots.give(one)
    assert slots.take() == one and slots.take() not in (one, two)


def test_the_memory_is_gone_with_the_slots():
    slots = Slots(FIELDS)
    slots.array(slots.take(), "ids")[:] = 1
    before = sum(1 for _ in Path("/proc/self/fd").iterdir())
    gone = weakref.ref(slots)
    del slots
    assert gone() is None and sum(1 for _ in Path("/proc/self/fd").iterdir()) < before
