"""A console that is closed, full, gone, unread or speaks ASCII: work continues, what only prints ends as Unix does."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from fastmae.train import console
from tests.support import faults
from tests.support.crew import Crew
from tests.support.forked import run_together
from tests.support.runs import records

STEPS = 30


def write_into(handle, number=1, encoding="utf-8"):
    """A stream in place of standard output or error, that writes to ``handle``."""
    return console._wrap(os.fdopen(handle, "w", encoding=encoding, closefd=False), number)


@pytest.fixture(autouse=True)
def none_lost(monkeypatch):
    monkeypatch.setattr(console, "_LOST", {})


@pytest.fixture
def pipe():
    """The two ends of a pipe that holds one page, to read and to write; a test may take one out and close it."""
    ends = list(os.pipe())
    fcntl.fcntl(ends[1], fcntl.F_SETPIPE_SZ, 4096)
    yield ends
    for end in ends:
        os.close(end)


def test_names_that_an_ascii_console_lacks_are_escaped(pipe):
    stream = write_into(pipe[1], encoding="ascii")
    stream.write("käse \udcff\n")
    stream.flush()
    assert os.read(pipe[0], 100) == rb"k\xe4se \udcff" + b"\n"


def test_what_is_longer_than_a_pipe_arrives_whole(pipe):
    stream = write_into(pipe[1])
    text = "".join(f"{number}\n" for number in range(20000))
    writer = threading.Thread(target=lambda: (stream.write(text), stream.flush()))
    writer.start()
    read = b""
    while len(read) < len(text):
        read += os.read(pipe[0], 1000)
    writer.join()
    assert read == text.encode()


def test_a_program_whose_reader_is_gone_ends_as_by_sigpipe(pipe):
    stream = write_into(pipe[1])
    os.close(pipe.pop(0))
    with pytest.raises(SystemExit) as ended:
        print("text", file=stream, flush=True)
    assert ended.value.code == 128 + signal.SIGPIPE
    print("the last words", file=stream, flush=True)  # of its cleaning up


def test_a_full_disk_is_an_error_that_names_the_stream_once():
    with Path("/dev/full").open("w") as full:
        stream = write_into(full.fileno())
        with pytest.raises(OSError) as failed:
            print("text", file=stream, flush=True)
        assert (failed.value.errno, failed.value.filename) == (errno.ENOSPC, "standard output")
        stream.flush()


def test_standard_error_ends_nothing_and_is_remembered():
    with Path("/dev/full").open("w") as full:
        stream = write_into(full.fileno(), 2)
        print("text", file=stream, flush=True)
    assert console.lost() == {"standard error": "No space left on device"}


def test_a_reader_that_does_not_read_is_waited_for_once_and_gets_what_comes_after_it_has_read(pipe, monkeypatch):
    monkeypatch.setattr(console, "_READER_TIMEOUT", 0.2)
    stream = write_into(pipe[1], 2)
    for number in range(1000):
        print(number, "x" * 100, file=stream, flush=True)
    assert console.lost() == {"standard error": "nobody reads it"}
    os.read(pipe[0], 1 << 16)
    print("again", file=stream, flush=True)
    assert os.read(pipe[0], 100) == b"again\n"


def lose_streams(folder):
    """In a process of its own: all three closed, as Python finds them then."""
    for number in range(3):
        os.close(number)
    sys.stdin = sys.stdout = sys.stderr = sys.__stdin__ = sys.__stdout__ = sys.__stderr__ = None
    console.open_streams()
    path = folder / "checkpoint"
    with path.open("wb") as file:
        assert file.fileno() > 2
        file.write(b"weights")
        file.flush()
        print("text", flush=True)
        print("text", file=sys.stderr)
        os.write(1, b"text of a library in C")
        subprocess.run(["sh", "-c", "echo text; echo text >&2"], check=True)
    assert path.read_bytes() == b"weights" and sys.stdin.read() == ""


def test_closed_streams_are_taken_by_nothing_else(tmp_path):
    run_together(lose_streams, [(tmp_path,)])


def test_streams_that_a_program_has_replaced_stay(capsys):
    before = sys.stdout, sys.stderr
    with console.outlived():
        assert (sys.stdout, sys.stderr) == before
        print("text")
    assert capsys.readouterr().out == "text\n"


def ended_without_reader(*words):
    """Exit code of a program that nobody reads; it must be quiet."""
    ours, theirs = os.pipe()
    os.close(ours)
    done = subprocess.run([sys.executable, "-m", *map(str, words)], stdout=theirs, stderr=subprocess.PIPE, check=False)
    os.close(theirs)
    assert done.stderr == b""
    return done.returncode


@pytest.mark.parametrize("words", ["fastmae.train shards info SHARDS", "fastmae.benchmarks --help"])
def test_what_only_prints_ends_quietly_once_its_reader_is_gone(words, shard_folder):
    assert ended_without_reader(*(shard_folder if word == "SHARDS" else word for word in words.split())) == 141


@pytest.mark.parametrize("program", ["fastmae.train", "fastmae.benchmarks"])
def test_what_only_prints_says_that_a_disk_is_full(program):
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", program, "--help"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.endswith(": standard output: No space left on device\n") and done.stderr.count("\n") == 1


# Runs. Each changes the streams of its process before that begins.


def no_space(rank):
    with Path("/dev/full").open("w") as full:
        for number in (1, 2):
            os.dup2(full.fileno(), number)


def no_reader(rank):
    ours, theirs = os.pipe()
    os.close(ours)
    os.dup2(theirs, 1)


def a_reader_that_does_not_read(rank):
    console._READER_TIMEOUT = 0.2
    _, theirs = os.pipe()
    fcntl.fcntl(theirs, fcntl.F_SETPIPE_SZ, 4096)
    os.dup2(theirs, 1)


def all_closed(rank):
    for number in range(3):
        os.close(number)
    sys.stdin = sys.stdout = sys.stderr = sys.__stdin__ = sys.__stdout__ = sys.__stderr__ = None


def a_terminal_that_is_closed(rank):
    """After ten steps; the system sends SIGHUP then."""
    ours, theirs = os.openpty()
    for number in range(3):
        os.dup2(theirs, number)
    os.close(theirs)
    faults.before_step(lambda: (os.close(ours), os.kill(os.getpid(), signal.SIGHUP)), rank, at=10)


@pytest.mark.cluster
@pytest.mark.parametrize(
    ("fault", "lost"),
    [
        (no_space, {"standard output": "No space left on device", "standard error": "No space left on device"}),
        (no_reader, {"standard output": "Broken pipe"}),
        (a_reader_that_does_not_read, {"standard output": "nobody reads it"}),
        (all_closed, {}),
        (a_terminal_that_is_closed, {"standard output": "Input/output error", "standard error": "Input/output error"}),
    ],
)
def test_a_run_outlives_its_console_and_its_log_says_so_once(fault, lost, shard_folder, tmp_path):
    out = tmp_path / "run-äü"
    flags = ("--steps", STEPS, "--save-every", 1000, "--workers", 0)  # a worker would hold the other end open
    with Crew(1, shard_folder, out, *flags, fault=fault) as crew:
        assert crew.end() == [0], crew.text()
    found = records(out)
    told = [(r["stream"], r["reason"]) for r in found if r.get("event") == "console_lost"]
    assert sorted(told) == sorted(lost.items())
    last = 10 if fault is a_terminal_that_is_closed else STEPS
    assert [p.name for p in out.glob("step-*")] == [f"step-{last:07d}"]
    if "standard error" not in lost and lost:
        assert "fastmae: standard output cannot be written" in crew.text()
