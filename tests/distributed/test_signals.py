"""Signals that ask a run to stop, to any of its processes, at any moment: all end the same step, save, and end well."""

import os
import re
import signal
import time
from functools import partial

import pytest

from fastmae.train.distributed.signals import SIGNALS, StopSignals
from tests.support import faults
from tests.support.crew import Crew, run, speak_into
from tests.support.forked import context
from tests.support.processes import wait_until
from tests.support.runs import FLAGS as TINY
from tests.support.runs import TORCHRUN, assert_same_bits, finish, losses, records, start

STEPS = 30
FLAGS = ("--steps", STEPS, "--blr", "0.05", "--save-every", "1000")
LAST = f"step-{STEPS:07d}"
AT_ONCE = 10.0  # seconds from a signal to the end of the last process, on a quiet machine


def test_the_handlers_of_before_come_back():
    before = [signal.getsignal(number) for number in SIGNALS]
    with StopSignals() as signals:
        assert signals.received is None
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_the_first_signal_is_noted_and_those_that_follow_do_not_end_the_process():
    signal.signal(signal.SIGUSR1, lambda *_: None)  # somebody else's
    others = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGINT)}
    with StopSignals() as signals:
        for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT, signal.SIGINT):
            signal.raise_signal(number)
        assert signals.received == "SIGUSR2"
    signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGUSR2)
    assert {number: signal.getsignal(number) for number in others} == others


@pytest.mark.parametrize("number", SIGNALS)
def test_each_signal_is_noted_by_its_name(number):
    with StopSignals() as signals:
        signal.raise_signal(number)
        assert signals.received == signal.Signals(number).name


def test_only_a_second_interrupt_after_a_while_means_now(monkeypatch):
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with StopSignals() as signals:
        signal.raise_signal(signal.SIGTERM)
        now += 4.9
        signal.raise_signal(signal.SIGINT)
        now += 0.2
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert signals.received == "SIGTERM"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP, signal.SIGQUIT])
def test_what_a_terminal_sends_stays_ignored_where_nohup_or_a_script_has_it_ignored(number):
    signal.signal(number, signal.SIG_IGN)
    with StopSignals() as signals:
        signal.raise_signal(number)
        assert signals.received is None
        signal.raise_signal(signal.SIGTERM)
        assert signals.received == "SIGTERM"
    assert signal.getsignal(number) is signal.SIG_IGN


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_what_a_scheduler_sends_is_noted_even_where_a_script_has_it_ignored(number):
    signal.signal(number, signal.SIG_IGN)
    with StopSignals() as signals:
        signal.raise_signal(number)
        assert signals.received == signal.Signals(number).name
    assert signal.getsignal(number) is signal.SIG_IGN


def hold_python(console):
    speak_into(console)
    with StopSignals():
        print("holds", flush=True)
        faults.hold_interpreter()


def test_sigquit_writes_the_stacks_of_a_process_that_holds_python(tmp_path):
    path = tmp_path / "console"
    process = context().Process(target=hold_python, args=(path,))
    process.start()
    try:
        assert wait_until(lambda: path.exists() and "holds" in path.read_text(), 30)
        time.sleep(0.2)
        os.kill(process.pid, signal.SIGQUIT)
        assert wait_until(lambda: "in hold_python" in path.read_text(), 30)
        assert process.exitcode is None
    finally:
        process.kill()
        process.join()


@pytest.fixture(scope="module")
def undisturbed(shard_folder, tmp_path_factory):
    """The folder of a run of two processes to which nothing happened."""
    out = tmp_path_factory.mktemp("undisturbed")
    run(2, shard_folder, out, *FLAGS)
    return out


def stop(crew, number, *ranks, times=1, group=False):
    """Send signals; all processes must end well, having begun the same number of steps, which is returned."""
    for _ in range(times):
        began = crew.send(number, *ranks, group=group)
        time.sleep(0.1 if times > 1 else 0)
    assert crew.end(60) == [0, 0], crew.text()
    print(f"{time.monotonic() - began:.1f} s from {signal.Signals(number).name} to the end")
    assert time.monotonic() - began < AT_ONCE + faults.load()
    begun = {path.name: len(path.read_text()) for path in crew.out.glob("steps-of-rank-*")}
    assert len(set(begun.values())) == 1 or not begun, begun
    (stopped,) = [record["step"] for record in records(crew.out) if record.get("event") == "stopped"]
    assert stopped == next(iter(begun.values()), 0) < STEPS
    assert f"stopped by {signal.Signals(number).name} on rank" in crew.text(0)
    return stopped


def assert_goes_on_to(whole, shards, out):
    """The next start of the run in ``out`` ends with the bits of the run ``whole``."""
    run(2, shards, out, *FLAGS)
    assert_same_bits(out / LAST, whole / LAST)
    assert losses(out) == losses(whole)


@pytest.mark.cluster
@pytest.mark.parametrize(
    ("number", "ranks", "how"),
    [
        (signal.SIGTERM, (1,), {}),
        (signal.SIGQUIT, (0,), {"group": True}),  # as torchrun passes it on, or a terminal sends it
        (signal.SIGHUP, (), {"group": True, "times": 2}),  # as a terminal that is closed, and then torchrun
        (signal.SIGINT, (), {"group": True}),  # as Ctrl-C does: the loader's workers have it too
        (signal.SIGTERM, (), {"group": True, "times": 3}),
    ],
)
def test_all_stop_after_the_same_step_and_the_next_start_goes_on_with_the_same_bits(
    number, ranks, how, undisturbed, shard_folder, tmp_path
):
    out = tmp_path / "run"
    out.mkdir()
    fault = partial(faults.all_of, (partial(faults.slow_steps, 0.1), partial(faults.count_steps, out)))
    with Crew(2, shard_folder, out, *FLAGS, fault=fault) as crew:
        crew.wait_for("step 5/")
        assert stop(crew, number, *ranks, **how) >= 5
        assert crew.text().count("Current thread") == (number == signal.SIGQUIT)  # stacks of that rank, not of its workers
        assert "loader worker" not in crew.text()  # none of them died of it
    assert_goes_on_to(undisturbed, shard_folder, out)


@pytest.mark.cluster
@pytest.mark.parametrize("how", ["--async-save", "--no-async-save"])
def test_a_signal_during_a_save_waits_for_it(how, undisturbed, shard_folder, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    slow = (partial(faults.slow_steps, 0.1), partial(faults.slow_save, 1.0), partial(faults.count_steps, out))
    with Crew(2, shard_folder, out, *FLAGS, "--save-every", "5", how, fault=partial(faults.all_of, slow)) as crew:
        crew.wait_for(lambda: any(out.glob(".step-0000005.partial")))
        stopped = stop(crew, signal.SIGTERM, 1)
    assert {p.name for p in out.glob("step-*")} >= {"step-0000005", f"step-{stopped:07d}"}
    assert_goes_on_to(undisturbed, shard_folder, out)


@pytest.mark.cluster
def test_a_signal_during_the_start_stops_before_the_first_step(undisturbed, shard_folder, tmp_path):
    out = tmp_path / "run"
    with Crew(2, shard_folder, out, *FLAGS, fault=partial(faults.slow_start, 0.5)) as crew:
        crew.wait_for(lambda: "joined" in crew.text(1))
        assert stop(crew, signal.SIGUSR1, 1) == 0
    assert (out / "step-0000000").is_dir()
    assert_goes_on_to(undisturbed, shard_folder, out)


@pytest.mark.cluster
@pytest.mark.parametrize(("number", "flags", "code"), [(signal.SIGTERM, (), 130), (signal.SIGINT, (), 130),
                                                       (signal.SIGUSR1, ("--requeue-exit",), 85)])  # fmt: skip
def test_a_signal_during_the_rendezvous_ends_the_process_at_once(number, flags, code, shard_folder, tmp_path):
    with Crew(3, shard_folder, tmp_path / "run", *FLAGS, *flags, fault=partial(faults.never_join, 2)) as crew:
        crew.wait_for("2 of 3 processes have joined, missing rank 2;")
        began = crew.send(number, 1)
        assert crew.end(20, (0, 1)) == [4, code], crew.text()
        assert time.monotonic() - began < AT_ONCE + faults.load()
        assert f"fastmae: stopped by {number.name} during the rendezvous" in crew.text(1)
        assert re.search(rf"fastmae: rank 1 on \S+ has left the rendezvous, stopped by {number.name}; the others", crew.text(0))
        assert "Traceback" not in crew.text()


@pytest.mark.cluster
@pytest.mark.parametrize("on", [0, 1])
def test_a_signal_while_torch_connects_the_processes_ends_the_others_too(on, shard_folder, tmp_path):
    with Crew(3, shard_folder, tmp_path / "run", *FLAGS, fault=partial(faults.never_connect, on)) as crew:
        crew.wait_for(lambda: crew.text().count("connects") == 3)
        began = crew.send(signal.SIGTERM, on)
        assert crew.end(40) == [130 if rank == on else 4 for rank in range(3)], crew.text()
        assert time.monotonic() - began < AT_ONCE + faults.load()
        assert crew.text(on).endswith("fastmae: stopped by SIGTERM while gloo was set up\n")
        assert f"fastmae: rank {on} on " in crew.text(2) and "stopped by SIGTERM" in crew.text(2)
        assert "Traceback" not in crew.text()


@pytest.mark.cluster
@pytest.mark.parametrize("size", [1, 2])
def test_a_run_that_wants_to_go_on_says_so_by_its_exit_code_until_it_is_done(size, shard_folder, tmp_path):
    out, flags = tmp_path / "run", (*FLAGS, "--requeue-exit")
    with Crew(size, shard_folder, out, *flags, fault=partial(faults.slow_steps, 0.1)) as crew:
        crew.wait_for("step 5/")
        crew.send(signal.SIGUSR1)
        assert crew.end() == [85] * size, crew.text()
        assert crew.text(0).count("fastmae: stopped by SIGUSR1") == 1 and "Traceback" not in crew.text()
    run(size, shard_folder, out, *flags)


@pytest.mark.cluster
def test_a_second_interrupt_ends_a_process_at_once_and_the_others_with_it(shard_folder, tmp_path):
    with Crew(2, shard_folder, tmp_path / "run", *FLAGS, fault=partial(faults.sleep_at, 3, 0)) as crew:
        crew.wait_for("asleep")
        crew.send(signal.SIGINT, 0)
        time.sleep(5.5)
        crew.send(signal.SIGINT, 0)
        assert crew.end(40) == [130, 4], crew.text()
        assert "fastmae: rank 0 has failed, KeyboardInterrupt" in crew.text(1)


@pytest.mark.cluster
def test_torchrun_passes_a_signal_on_and_the_run_is_saved(undisturbed, shard_folder, tmp_path):
    flags = [*FLAGS, "--effective-batch", 12, "--batch-size", 6, "--data", shard_folder, "--out", tmp_path]
    environment = {"TESTS_SLOW_STEPS": "0.1"}
    process = start([*TINY, *flags], (*TORCHRUN, "2"), program=("-m", "tests.support.crew"), **environment)
    end = time.monotonic() + 60
    while not (tmp_path / "metrics.jsonl").exists() or len(losses(tmp_path)) < 5:
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, text = finish(process)
    print(f"{time.monotonic() - began:.1f} s from SIGTERM to the end of torchrun")
    assert re.search(r"stopped by SIGTERM on rank [01]( and 1 others)? after step", text), text
    assert not re.search("exitcode *: *-?[1-9]", text), text  # none of its processes failed
    assert_goes_on_to(undisturbed, shard_folder, tmp_path)
