"""The rendezvous of a run, each process a thread here: all join, or a line names who has not, where it is awaited, and why."""

import itertools
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta

import pytest
import torch.distributed as dist

from fastmae.errors import InputError, LostProcessError
from fastmae.train.distributed import background, rendezvous, store
from fastmae.train.distributed.background import Background, has_abandoned, pauses
from fastmae.train.distributed.launcher import RankInfo
from fastmae.train.distributed.peers import this_peer
from fastmae.train.distributed.rendezvous import Rendezvous
from tests.support.runs import free_port

HOST = "127.0.0.1"


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """A tenth of a second stands for half a minute."""
    monkeypatch.setattr(rendezvous, "FIRST_REPORT", 0.1)
    monkeypatch.setattr(rendezvous, "LINGER", 0.7)
    monkeypatch.setattr(background, "_TICK", 0.01)
    yield
    end = time.monotonic() + 10
    while has_abandoned() and time.monotonic() < end:
        time.sleep(0.01)
    assert not has_abandoned()


@pytest.fixture
def reports(monkeypatch):
    """What is reported, with the time."""
    reported = []
    monkeypatch.setattr(rendezvous, "report", lambda text: reported.append((time.monotonic(), text)))
    return reported


class Start:
    """A start of ``size`` processes at one port; those that ``join`` are joined by ``ends``."""

    def __init__(self, size, port=None, **info):
        self.info = {
            "size": size,
            "address": HOST,
            "port": port or free_port(),
            "source": "MASTER_ADDR and MASTER_PORT",
            **info,
        }
        self.pool, self.ends, self.signals = ThreadPoolExecutor(8), {}, {}

    def join(self, *ranks, timeout=20.0, **info):
        for rank in ranks:
            here = RankInfo(**{**self.info, "rank": rank, "local_rank": rank, "local_size": self.info["size"], **info})
            process = Rendezvous(here, this_peer(here, 0), timeout, lambda rank=rank: self.signals.get(rank))
            self.ends[rank] = self.pool.submit(process.wait)

    def error(self, rank):
        return self.ends[rank].exception(timeout=20)


@contextmanager
def waiting_for(reported, text, seconds=10):
    end = time.monotonic() + seconds
    while not any(text in line for _, line in reported):
        assert time.monotonic() < end, reported
        time.sleep(0.005)
    yield


def test_all_processes_learn_of_each_other_and_share_a_store(reports):
    start = Start(3)
    start.join(2, 1, 0)
    stores, peers = zip(*(start.ends[rank].result(20) for rank in range(3)), strict=True)
    assert peers[0] == peers[1] == peers[2] and [peer.rank for peer in peers[0]] == [0, 1, 2]
    stores[1].set("word", "from 1")
    assert [one.get("word") for one in stores] == [b"from 1"] * 3


def test_a_process_that_does_not_come_is_named_again_and_again_and_a_signal_ends_the_others(reports):
    start = Start(4, hosts=("n1", "n1", "n2", "n3"))
    start.join(0, 1)
    with waiting_for(reports, "2 of 4 processes have joined, missing rank 2, 3 (n2, n3); "):
        time.sleep(1.0)
    times = [when for when, line in reports if line.startswith("rank 0 of 4 on")]
    assert 3 <= len(times) <= 5 and all(line.startswith("rank 0 of 4 on") for _, line in reports)
    gaps = [b - a for a, b in itertools.pairwise(times)]
    assert all(later > 1.5 * earlier for earlier, later in itertools.pairwise(gaps)), gaps
    assert f"waits for the others at {HOST}:{start.info['port']} (MASTER_ADDR and MASTER_PORT) for " in reports[-1][1]
    began, start.signals[0] = time.monotonic(), "SIGTERM"
    assert str(start.error(0)).startswith("stopped by SIGTERM during the rendezvous: 2 of 4 processes have joined")
    assert isinstance(start.error(0), KeyboardInterrupt) and time.monotonic() - began < 3
    assert isinstance(start.error(1), LostProcessError) and "rank 0 on" in str(start.error(1))
    assert "has left the rendezvous, stopped by SIGTERM; the others end" in str(start.error(1))


def test_a_signal_to_another_process_is_told_to_all(reports):
    start = Start(3)
    start.join(0, 1)
    with waiting_for(reports, "2 of 3"):
        start.signals[1] = "SIGUSR1"
    assert isinstance(start.error(1), KeyboardInterrupt)
    assert isinstance(start.error(0), LostProcessError) and "rank 1 on" in str(start.error(0))


def test_after_its_time_the_missing_are_named_on_every_process(reports):
    start = Start(3)
    start.join(0, 1, timeout=0.5)
    errors = [str(start.error(rank)) for rank in (0, 1)]
    assert isinstance(start.error(0), LostProcessError) and isinstance(start.error(1), LostProcessError)
    assert "(--first-timeout): 2 of 3 processes have joined, missing rank 2" in errors[0]
    assert "missing rank 2" in errors[1] or "has left the rendezvous, its --first-timeout is over" in errors[1]


def test_a_process_says_where_it_looks_for_rank_0_and_once_that_it_has_reached_it(reports):
    start = Start(3)
    start.join(1, 2, local_rank=0, local_size=1)
    with waiting_for(reports, "looks for rank 0 at"):
        assert f"{HOST}:{start.info['port']} does not answer (Connection refused)" in reports[0][1]
    start.signals[2] = "SIGINT"
    assert isinstance(start.error(2), KeyboardInterrupt)
    start.signals.clear()
    start.join(0)
    with waiting_for(reports, "rank 1 of 3 on " + socket.gethostname() + " waits for the others"):
        time.sleep(0.5)
    assert sum("rank 1 of 3" in line and "missing rank 2" in line for _, line in reports) == 1
    start.join(2)
    assert [len(start.ends[rank].result(20)[1]) for rank in range(3)] == [3, 3, 3]


def test_a_name_that_does_not_resolve_is_said_at_once_and_may_resolve_later(reports, monkeypatch):
    resolve, is_known = socket.getaddrinfo, []

    def look_up(host, *arguments, **options):
        if host == "node001" and not is_known:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return resolve(HOST if host == "node001" else host, *arguments, **options)

    monkeypatch.setattr(rendezvous, "FIRST_REPORT", 30.0)
    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    start = Start(2, address="node001")
    start.join(0, 1, local_rank=0, local_size=1)
    name = "node001 does not resolve on this machine (Name or service not known)"
    with waiting_for(
        reports, f"looks for rank 0 at node001:{start.info['port']} (MASTER_ADDR and MASTER_PORT): {name}; retries"
    ):
        assert len(reports) <= 2
    is_known.append(True)
    assert [len(start.ends[rank].result(20)[1]) for rank in range(2)] == [2, 2]
    assert len(reports) == len({line for _, line in reports}) <= 2


def test_rank_0_says_that_its_address_does_not_lead_to_it(reports, monkeypatch):
    def refuse(*_, **__):
        raise ConnectionRefusedError(111, "Connection refused")

    monkeypatch.setattr(socket, "create_connection", refuse)
    start = Start(2)
    start.join(0)
    with waiting_for(reports, f"{HOST}:{start.info['port']} does not answer (Connection refused), although rank 0 listens; "):
        start.signals[0] = "SIGTERM"
    assert isinstance(start.error(0), KeyboardInterrupt)


def test_a_process_that_died_after_it_came_is_missed_before_the_run_begins(reports):
    start = Start(2)
    start.join(0)
    client = client_of(start)
    here = RankInfo(**start.info, rank=1)
    client.append("fastmae/peers", json.dumps({"rank": 1, "arrived": this_peer(here, 0).to_dict()}) + "\n")
    with waiting_for(reports, "1 of 2 processes still answer, missing rank 1"):
        start.signals[0] = "SIGTERM"
    assert isinstance(start.error(0), KeyboardInterrupt)


def client_of(start):
    end = time.monotonic() + 10
    while True:
        try:
            socket.create_connection((HOST, start.info["port"]), timeout=1).close()
            break
        except OSError:
            assert time.monotonic() < end
            time.sleep(0.01)
    return dist.TCPStore(HOST, start.info["port"], is_master=False, timeout=timedelta(seconds=5), wait_for_workers=False)


def test_a_process_that_was_started_again_takes_the_place_of_the_one_before(reports):
    start = Start(2)
    start.join(0)
    ended = {**this_peer(RankInfo(**start.info, rank=1), 0).to_dict(), "pid": 1, "host": "before"}
    client_of(start).append("fastmae/peers", json.dumps({"rank": 1, "arrived": ended}) + "\n")
    with waiting_for(reports, "still answer"):
        start.join(1)
    peers = start.ends[0].result(20)[1]
    assert peers[1].host == socket.gethostname() and start.ends[1].result(20)[1] == peers


def test_what_contradicts_ends_all_with_the_same_input_error(reports):
    start = Start(3)
    start.join(0)
    start.join(1, size=4)
    assert isinstance(start.error(0), InputError) and isinstance(start.error(1), InputError)
    assert str(start.error(0)) == str(start.error(1))
    assert str(start.error(0)).startswith("WORLD_SIZE=4 on rank 1 (")


def test_a_port_that_an_earlier_start_still_holds_is_waited_for(reports):
    start = Start(2)
    with socket.create_server((HOST, start.info["port"])):
        start.join(0)
        time.sleep(0.3)
        assert not start.ends[0].done()
    start.join(1)
    assert [len(start.ends[rank].result(20)[1]) for rank in range(2)] == [2, 2]


def test_a_second_rank_0_and_a_taken_port_are_input_errors(reports, monkeypatch):
    monkeypatch.setattr(store, "_ENDS", 0.3)
    start = Start(2)
    start.join(0)
    client_of(start)
    first = start.ends[0]
    start.join(0)
    assert isinstance(start.error(0), InputError) and "rank 0 cannot listen at port" in str(start.error(0))
    assert "export another MASTER_PORT" in str(start.error(0))
    here = RankInfo(**{**start.info, "rank": 0})
    with pytest.raises(InputError, match=r"rank 0 runs twice, on .* and at 127.0.0.1"):
        store._check_address(here, "another", lambda *_, **__: None)
    start.signals[0] = "SIGTERM"
    assert isinstance(first.exception(20), KeyboardInterrupt)


def test_rank_0_that_is_gone_is_named(reports):
    start = Start(2)
    server = dist.TCPStore(HOST, start.info["port"], is_master=True, timeout=timedelta(seconds=5), wait_for_workers=False)
    server.set(store.STATE, "")
    start.join(1)
    end = time.monotonic() + 10
    while not server.check(["fastmae/peers"]):
        assert time.monotonic() < end
    del server
    assert str(start.error(1)) == "rank 0 was lost before all processes had joined"


def test_a_process_that_comes_once_the_run_goes_waits_for_the_next_start(reports):
    """An operator has started it again at once, while rank 0 still waits for the one before."""
    start = Start(2)
    server = dist.TCPStore(HOST, start.info["port"], is_master=True, timeout=timedelta(seconds=5), wait_for_workers=False)
    server.set(store.STATE, "go")
    start.join(1, local_rank=0, local_size=1)
    with waiting_for(reports, "that rank 0's run has begun without this process"):
        time.sleep(0.2)
    assert not start.ends[1].done()
    del server
    start.join(0, local_rank=0, local_size=1)
    assert [len(start.ends[rank].result(20)[1]) for rank in range(2)] == [2, 2]


def test_torchruns_store_leads_to_rank_0_of_this_start(reports, monkeypatch):
    """What an earlier start has left there is a port where nobody listens, or by now somebody else."""
    monkeypatch.setattr(store, "_FIRST_KEY", 0.3)
    options = {"is_master": True, "timeout": timedelta(seconds=5), "wait_for_workers": False}
    agents, others = (dist.TCPStore(HOST, 0, **options) for _ in range(2))
    start = Start(2, port=agents.port, has_agent_store=True)
    start.join(1)
    time.sleep(0.1)
    for port in (free_port(), others.port):
        agents.set("fastmae/port", str(port))
        time.sleep(0.4)
    assert not start.ends[1].done()
    start.join(0)
    ends = [start.ends[rank].result(20) for rank in (0, 1)]
    assert ends[0][1] == ends[1][1] and ends[0][0].port == ends[1][0].port not in (agents.port, others.port)


@pytest.mark.parametrize("processes", [2, 64, 512])
def test_questions_to_the_store_grow_with_the_processes_and_not_with_their_square(processes, monkeypatch):
    now, looks = [0.0], []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    for pause in pauses(processes):
        looks.append(now[0])
        now[0] += pause
        if now[0] > 60:
            break
    assert sum(look > 5 for look in looks) <= 2 * 55 + 1 and sum(look < 5 for look in looks) < 80
    assert processes * sum(look < 1 for look in looks) <= 1.1e4


def test_a_thread_that_never_ends_keeps_nobody_waiting():
    forever = threading.Event()
    with pytest.raises(KeyboardInterrupt):
        Background(forever.wait).wait(lambda seconds: (_ for _ in ()).throw(KeyboardInterrupt))
    assert has_abandoned()
    forever.set()


def test_errors_of_the_thread_are_raised_by_whoever_waits():
    with pytest.raises(ZeroDivisionError):
        Background(lambda: 1 / 0).wait(lambda seconds: None)
