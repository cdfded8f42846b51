"""The clock that stands still while a process is suspended."""

from types import SimpleNamespace

import pytest

from fastmae import clock
from fastmae.clock import RunClock


@pytest.fixture
def system(monkeypatch):
    """The system's clock, moved by ``system.now``."""
    moved = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(clock, "time", SimpleNamespace(monotonic=lambda: moved.now))
    return moved


def test_it_follows_the_systems_clock_while_it_is_read(system):
    running = RunClock()
    assert running.read() == 0.0
    for _ in range(10):
        system.now += clock.LOOK
        running.read()
    assert running.read() == 10 * clock.LOOK


def test_a_day_between_two_reads_counts_as_the_longest_interval(system):
    running = RunClock()
    system.now += 0.5
    assert running.read() == 0.5
    for _ in range(3):
        system.now += 86400.0
        running.read()
    assert running.read() == 0.5 + 3 * clock._MAX_INTERVAL
