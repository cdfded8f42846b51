"""What a run's log tells: what holds after restarts, how it ended, and what to do about a log that says too little."""

import json
import re

import pytest

from fastmae.errors import DataError, InputError
from fastmae.train.report.history import read_history


def start(step=0, time=0.0, total=100, **more):
    return {"event": "start", "schema": 1, "step": step, "time": time, "total_steps": total, **more}


def measured(step, time=None, loss=0.5, **more):
    return {"step": step, "time": float(step) if time is None else time, "loss": loss, **more}


def write(run, *records):
    """A log of records; a text is a line as it is."""
    lines = [record if isinstance(record, str) else json.dumps(record) + "\n" for record in records]
    (run / "metrics.jsonl").write_text("".join(lines))
    return run


def steps(history):
    return [m.step for m in history.measurements]


def test_a_restart_makes_later_steps_void_and_counts_them(tmp_path):
    history = read_history(write(
        tmp_path, start(), measured(10), measured(20), measured(30), measured(40, time=45.0),
        {"event": "checkpoint", "step": 20, "time": 26.0, "seconds": 5.0},
        start(20, 100.0, resumed_from="step-0000020"), measured(30, 110.0, loss=0.25),
    ))  # fmt: skip
    assert steps(history) == [10, 20, 30] and history.measurements[-1].values == {"loss": 0.25}
    first, second = history.attempts
    assert (first.lost_steps, first.last_step) == (0, 40)
    assert (second.lost_steps, second.lost_records, second.resumed_from) == (20, 2, "step-0000020")
    assert second.lost_seconds == 45.0 - 21.0 and second.pause == 100.0 - 45.0
    assert [m.running for m in history.measurements] == [10.0, 20.0, 45.0 + 10.0]  # the pause is no running time


def test_a_start_from_nothing_makes_everything_void(tmp_path):
    history = read_history(write(tmp_path, start(), measured(10), measured(20), start(0, 50.0)))
    assert steps(history) == [] and history.last.lost_steps == 20 and history.last.lost_records == 2


def test_a_second_restart_from_an_older_checkpoint_counts_from_where_the_run_was(tmp_path):
    log = [start(), measured(50), measured(60), start(50, 70.0), measured(55, 75.0), start(40, 80.0), measured(45, 90.0)]
    history = read_history(write(tmp_path, *log))
    assert [a.lost_steps for a in history.attempts] == [0, 10, 15] and steps(history) == [45]


def test_events_of_void_steps_go_and_those_of_processes_stay(tmp_path):
    events = ("replaced", "skipped", "spike", "reconstruction", "checkpoint", "worker_died", "checkpoint_failed")
    log = [start(), *({"event": name, "step": step, "time": step} for step in (10, 30) for name in events), start(20, 40.0)]
    history = read_history(write(tmp_path, *log))
    for name in events[:5]:
        assert [e["step"] for e in history.events[name]] == [10], name
    for name in events[5:]:
        assert [e["step"] for e in history.events[name]] == [10, 30], name


@pytest.mark.parametrize(
    ("tail", "state", "reason"),
    [
        ([{"event": "end", "step": 100}], "finished", ""),
        ([{"event": "end", "step": 60}], "stopped", ""),
        ([{"event": "stopped", "step": 60, "reason": "SIGTERM"}, {"event": "end", "step": 60}], "stopped", "SIGTERM"),
        ([{"event": "diverged", "step": 60, "reason": "not finite"}, {"event": "end", "step": 60}], "diverged", "not finite"),
        ([measured(60)], "running", ""),
        ([{"event": "end", "step": 60}, start(60, 61.0)], "running", ""),
    ],
)
def test_the_newest_attempt_says_how_the_run_stands(tail, state, reason, tmp_path):
    history = read_history(write(tmp_path, start(), measured(50), *tail))
    assert (history.state(now=100.0), history.last.reason) == (state, reason)


def test_a_run_that_logs_nothing_for_long_is_silent(tmp_path):
    history = read_history(write(tmp_path, start(), measured(10, 10.0), measured(20, 1010.0)))
    assert history.state(now=1010.0 + 4 * 1000) == "running"
    assert history.state(now=1010.0 + 6 * 1000) == "silent"
    no_times = read_history(write(tmp_path, {"event": "start", "schema": 1, "step": 0}, {"step": 1, "loss": 0.5}))
    assert no_times.state(now=0.0) == "silent" and no_times.measurements[0].running is None


def test_a_line_cut_by_a_kill_is_counted_and_the_start_behind_it_is_read(tmp_path):
    whole = json.dumps(start(10, 50.0, resumed_from="step-0000010", recipe={"seed": 3, "model": {"depth": 2}})) + "\n"
    for cut in ('{"step": 20, "ti', '{"event": "start", "schema": 1, "recipe": {"see', "{"):
        history = read_history(write(tmp_path, start(), measured(10), cut, whole, measured(20, 60.0), '{"st'))
        assert steps(history) == [10, 20] and history.last.resumed_from == "step-0000010" and history.unreadable == 2
        assert history.last.settings["recipe"] == {"seed": 3}


def test_what_is_no_finite_number_is_none(tmp_path):
    log = '{"step": 1, "time": NaN, "loss": null, "lr": Infinity, "mfu": "high", "grad_norm": true, "epoch": 1e999, "x": 2}\n'
    huge = '{"step": 2, "time": -1, "loss": %s}\n' % ("9" * 400)
    history = read_history(write(tmp_path, log, huge))
    values = history.measurements[0].values
    assert values.pop("x") == 2 and set(values.values()) == {None} and history.measurements[0].time is None
    assert history.measurements[1].values == {"loss": None} and history.measurements[1].time is None


def test_lines_that_are_no_records_are_counted(tmp_path):
    deep = [f'{{"event": "replaced", "sample": {"[" * n}{"]" * n}}}' for n in (200, 500, 900)]  # json reads them
    damaged = ["[1, 2]", "7", '{"loss": 1}', '{"step": -3}', '{"step": "x"}', '{"event": 4}', "[" * 90000, "\0", *deep]
    history = read_history(write(tmp_path, measured(1), *(f"{line}\n" for line in damaged), "\n", "  \n"))
    assert steps(history) == [1] and history.unreadable == len(damaged)


def test_settings_are_flat_and_their_changes_are_named(tmp_path):
    before = {"seed": 0, "augment": {"flip": True, "scale": [0.2, 1.0]}, "model": {"depth": 2}}
    after = {"seed": 0, "augment": {"flip": False, "scale": [0.2, 1.0]}, "model": {"depth": 2}, "views": 2}
    log = [start(recipe=before, world=1, environment={"host": "a"}, run={"workers": 1}),
           start(recipe=after, world=2, environment={"host": "b"}, run={"workers": 1})]  # fmt: skip
    history = read_history(write(tmp_path, *log))
    assert history.last.settings["recipe"] == {"seed": 0, "augment.flip": False, "augment.scale": [0.2, 1.0], "views": 2}
    assert history.last.settings["model"] == {"depth": 2}
    assert [tuple(change) for change in history.changes()] == [
        (2, "environment: host", "a", "b"), (2, "environment: processes", 1, 2),
        (2, "recipe: augment.flip", True, False), (2, "recipe: views", None, 2),
    ]  # fmt: skip


@pytest.mark.parametrize("schema", [None, 0, 2, "1"])
def test_another_schema_is_named(schema, tmp_path):
    with pytest.raises(DataError, match=rf"metrics\.jsonl: schema must be 1, got {schema!r}; use the fastmae version"):
        read_history(write(tmp_path, start(), measured(10), start(10, 20.0, schema=schema)))


def test_a_log_without_a_start_is_one_attempt(tmp_path):
    history = read_history(write(tmp_path, measured(10, 30.0), measured(20, 50.0)))
    (attempt,) = history.attempts
    assert (attempt.first_step, attempt.last_step, attempt.began, attempt.seconds) == (0, 20, 30.0, 20.0)


def test_a_clock_that_goes_back_takes_no_time_away(tmp_path):
    history = read_history(write(tmp_path, start(0, 100.0), measured(10, 50.0), start(10, 20.0), measured(20, 30.0)))
    assert history.attempts[0].seconds == 0.0 and history.last.pause == 0.0
    assert [m.running for m in history.measurements] == [0.0, 10.0]


def test_what_is_missing_is_named_in_one_line(tmp_path):
    cases = [
        (tmp_path / "absent", InputError, "no such folder"),
        (tmp_path, InputError, r"metrics\.jsonl: missing; this folder holds no run"),
    ]
    (tmp_path / "empty").mkdir()
    cases.append((write(tmp_path / "empty", "\n"), InputError, "empty; the run has not started"))
    (tmp_path / "foreign").mkdir()
    cases.append((write(tmp_path / "foreign", "a,b\n", "1,2\n"), DataError, "none of its 2 lines is a record"))
    (tmp_path / "folder" / "metrics.jsonl").mkdir(parents=True)
    cases.append((tmp_path / "folder", InputError, "cannot be read, Is a directory"))
    for run, kind, message in cases:
        with pytest.raises(kind) as caught:
            read_history(run)
        assert re.search(message, str(caught.value)) and str(run) in str(caught.value) and "\n" not in str(caught.value)
