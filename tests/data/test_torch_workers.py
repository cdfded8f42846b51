"""Workers of a stream, which torch's DataLoader starts: killed, stuck or left behind, none outlives the stream."""

import contextlib
import gc
import os
import signal
import subprocess
import sys
import time
from multiprocessing import active_children
from pathlib import Path

import pytest
from torch.utils.data import DataLoader
from torch.utils.data._utils import signal_handling

from fastmae import DataError
from fastmae.data.batch import LoaderConfig
from fastmae.data.loader import Loader


@pytest.fixture(params=["first", "not first"])
def loaders_before(request, monkeypatch):
    """The first DataLoader with workers sets torch's handler of SIGCHLD, which stays, and raises when any worker dies."""
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    monkeypatch.setattr(signal_handling, "_SIGCHLD_handler_set", False)
    if request.param == "not first":
        assert list(DataLoader(range(2), num_workers=1)) == [0, 1]
        assert signal.getsignal(signal.SIGCHLD) is not signal.SIG_DFL
    yield
    signal.signal(signal.SIGCHLD, before)


@contextlib.contextmanager
def stream(data, **fields):
    """A stream's iterator and its workers, of whom none may be left afterwards, not even a zombie."""
    others = set(active_children())
    config = {"image_size": (16, 16), "workers": 2, **fields}
    source = iter(Loader(data, LoaderConfig(**config), batch_size=4))
    workers = []

    def batches():
        for batch in source:
            workers[:] = workers or [p.pid for p in active_children() if p not in others]
            yield batch

    yield batches(), workers
    source.close()
    gc.collect()  # whatever raises in here is a warning, which fails the test
    assert set(active_children()) == others and not any(Path(f"/proc/{pid}").exists() for pid in workers)


def wait_for_end(pid):
    """Until the parent was told of the end of ``pid``; torch's handler, if it knew of the worker, would raise here."""
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)


def test_a_killed_worker_of_a_stream_ends_the_run_with_a_reason(tar_folder, loaders_before):
    with stream(tar_folder) as (source, workers):
        next(source)
        os.kill(workers[0], signal.SIGKILL)
        wait_for_end(workers[0])
        with pytest.raises(DataError, match=rf"loader worker {workers[0]} died, killed by SIGKILL; start again"):
            for _ in source:
                pass


def test_a_source_that_does_not_answer_is_an_error_in_time(loaders_before):
    with stream("pipe:sleep 20", workers=1, allow_pipe=True, timeout=1.0) as (source, _):
        began = time.monotonic()
        with pytest.raises(DataError, match="no data for 1 s from pipe:sleep 20 and others"):
            next(source)
        assert time.monotonic() - began < 9  # 1 s, and some for the worker to end


@pytest.mark.parametrize("damage", [None, signal.SIGKILL, signal.SIGSTOP])
def test_a_stream_that_is_closed_early_leaves_no_worker_whatever_became_of_it(tar_folder, loaders_before, damage):
    with stream(tar_folder) as (source, workers):
        next(source)
        if damage:
            os.kill(workers[0], damage)
        if damage == signal.SIGKILL:
            wait_for_end(workers[0])


def test_an_error_of_whoever_takes_the_batches_leaves_no_worker(tar_folder, loaders_before):
    with stream(tar_folder) as (source, workers), pytest.raises(KeyError):
        for _ in source:
            raise KeyError(*workers)


def test_a_program_that_ends_in_the_middle_of_a_stream_ends(tar_folder):
    """Its workers ignore SIGTERM, so that what multiprocessing does at the end would wait for them for ever."""
    code = """
import sys
from fastmae.data.batch import LoaderConfig
from fastmae.data.loader import Loader
source = iter(Loader(sys.argv[1], LoaderConfig(image_size=(16, 16), workers=2), batch_size=4))
next(source)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tar_folder)], capture_output=True, text=True, timeout=60, check=True)
    assert done.stderr == ""
