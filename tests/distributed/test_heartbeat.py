"""Heartbeats of several processes, here in one, through a real store."""

import re
import threading
import time
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch

from fastmae import clock
from fastmae.train.distributed import heartbeat
from fastmae.train.distributed.heartbeat import Heartbeat
from fastmae.train.distributed.world import World

TIMEOUT = 0.6  # seconds, twelve heartbeats


@dataclass(frozen=True)
class Listed(World):
    """One of several processes; ``box`` is where the main one puts its texts for the others."""

    box: list = field(default_factory=list)

    def from_main(self, text):
        if self.is_main:
            self.box.append(text)
        return self.box[-1]


@pytest.fixture
def three(monkeypatch):
    """The heartbeats of three processes."""
    monkeypatch.setattr(heartbeat, "_TICK", 0.05)
    monkeypatch.setattr(heartbeat, "_AT_FAULT", TIMEOUT)
    monkeypatch.setattr(heartbeat, "_LINGER", 0.2)
    box = []
    made = [Heartbeat(Listed(rank, 3, torch.device("cpu"), address="127.0.0.1", box=box)) for rank in range(3)]
    yield made
    for each in reversed(made):
        each.end()


def silence(each):
    """As if killed: its thread sends and reads nothing more."""
    each._exchange = lambda: None


def names(message, ranks):
    """Whether it says that these ``ranks`` have sent no heartbeat, and for how long."""
    return re.fullmatch(rf"no heartbeat from rank {ranks} for \d+ s", message)


def within(seconds, look):
    """What ``look`` gives, as soon as that is something."""
    end = time.monotonic() + seconds
    while not (found := look()) and time.monotonic() < end:
        time.sleep(0.01)
    return found


def test_while_all_live_nobody_is_lost(three):
    time.sleep(2 * TIMEOUT)
    assert [each.lost(TIMEOUT) for each in three] == [None] * 3
    assert [each.failed() for each in three] == [None] * 3


def test_a_silent_rank_is_named_by_rank_0_and_by_the_others(three):
    silence(three[2])
    assert names(within(5, lambda: three[0].lost(TIMEOUT)), "2")
    assert names(within(5, lambda: three[1].lost(TIMEOUT)), "2")


def test_several_that_are_silent_are_named_together(three):
    silence(three[1])
    silence(three[2])
    time.sleep(2 * TIMEOUT)
    assert names(three[0].lost(TIMEOUT), "1, 2")


def test_a_process_that_ended_by_itself_is_not_lost(three):
    three[1].end()
    time.sleep(2 * TIMEOUT)
    assert three[0].lost(TIMEOUT) is None and three[2].lost(TIMEOUT) is None


@pytest.mark.parametrize("how", ["silent", "gone"])
def test_the_main_process_is_missed_by_the_others(how, three):
    woken = threading.Event()

    def wait(*_):
        woken.wait(30)
        raise RuntimeError("woken")

    if how == "silent":  # the store is there, and does not answer: as of a process that is stopped
        three[1]._store = three[2]._store = SimpleNamespace(set=wait, multi_get=wait)
    else:
        silence(three[0])
        time.sleep(0.1)
        three[0]._store = None  # the store goes with it
    for each in three[1:]:
        assert names(within(5, lambda each=each: each.lost(TIMEOUT)), "0")
    woken.set()


def test_the_first_that_fails_is_published_with_its_reason(three):
    three[1].fail(ValueError("no such thing\nand more"))
    assert within(5, three[2].failed) == "rank 1 has failed, ValueError: no such thing"
    three[2].fail(TypeError("later"))
    assert within(5, three[0].lost_at_fault) == "rank 1 has failed, ValueError: no such thing"


def test_after_a_fault_the_lost_one_is_looked_for(three):
    assert three[0].lost_at_fault() is None
    silence(three[1])
    assert names(three[0].lost_at_fault(), "1")


def test_stacks_are_asked_of_all(three):
    three[1].request_stacks()
    assert [within(5, each.stacks_requested_by) for each in three] == ["rank 1"] * 3


def test_time_in_which_all_were_suspended_does_not_count(three, monkeypatch):
    later = 0.0
    monkeypatch.setattr(clock, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + later))
    monkeypatch.setattr(clock, "_MAX_INTERVAL", TIMEOUT / 2)
    later = 1000.0  # every deadline has passed
    assert [each.lost(TIMEOUT) for each in three] == [None] * 3
    silence(three[1])
    assert names(within(5, lambda: three[0].lost(TIMEOUT)), "1")


def test_in_a_run_of_one_nothing_is_sent():
    alone = Heartbeat(World(0, 1, torch.device("cpu")))
    alone.request_stacks()
    alone.fail(ValueError("no"))
    assert (alone.lost(0.0), alone.lost_at_fault(), alone.failed()) == (None, None, None)
    alone.end()
