"""The lock of a run's folder: one run at a time, and free as soon as its process is gone, whatever that leaves behind."""

import errno
import fcntl
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastmae import InputError
from fastmae.lock import FolderLock, lock_holder
from fastmae.train.pretrain.pretrain import pretrain
from tests.support.runs import FLAGS, RECIPE, TORCHRUN, finish, losses, run_of, start, wait_for

HOLDER = """
import os, sys, time
from pathlib import Path
from fastmae.lock import FolderLock

lock = FolderLock(Path(sys.argv[1]))
assert lock.acquire() is None
if sys.argv[2] == "forks" and os.fork() == 0:  # as a loader's worker: it has the lock's file open
    Path(sys.argv[1], "pid").write_text(str(os.getpid()))
    Path(sys.argv[1], "pid").rename(Path(sys.argv[1], "child"))  # complete once it is there
    time.sleep(600)
    os._exit(0)
print("held", flush=True)
sys.stdin.readline()
lock.release()
print("released", flush=True)
time.sleep(600)
"""


@pytest.fixture
def hold(tmp_path):
    """A function that starts a process which holds the lock of the test's folder until it is sent a line."""
    started = []

    def start_holder(how="alone"):
        process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path), how], stdin=subprocess.PIPE,
                                   stdout=subprocess.PIPE, text=True, bufsize=1)  # fmt: skip
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield start_holder
    if (tmp_path / "child").exists():
        os.kill(int((tmp_path / "child").read_text()), signal.SIGKILL)
    for process in started:
        process.kill()
        process.communicate()


def test_a_second_run_is_refused_with_the_process_and_host_of_the_first(hold, tmp_path):
    holder, lock = hold(), FolderLock(tmp_path)
    began = time.monotonic()
    with pytest.raises(InputError) as refused:
        lock.acquire(patience=0.5)
    assert time.monotonic() - began >= 0.5
    assert str(refused.value) == (
        f"{tmp_path}: another run writes here, process {holder.pid} on {socket.gethostname()}; wait for its end, or give "
        "another --out"
    )
    lock.release()


def test_a_lock_that_is_released_while_another_process_waits_is_taken(hold, tmp_path):
    holder, lock = hold(), FolderLock(tmp_path)
    with pytest.raises(InputError):
        lock.acquire(patience=0)
    lock.release()
    holder.stdin.write("release\n")
    assert lock.acquire(patience=60) is None
    assert lock.path.read_text() == f"process {os.getpid()} on {socket.gethostname()}"
    lock.release()


def test_a_killed_process_leaves_no_lock_even_if_its_children_live(hold, tmp_path):
    holder, lock = hold("forks"), FolderLock(tmp_path)
    wait_for(tmp_path / "child", holder)
    holder.kill()
    holder.wait()
    os.kill(child := int((tmp_path / "child").read_text()), 0)  # it lives
    assert f"{tmp_path}/.lock" in [str(p.readlink()) for p in Path(f"/proc/{child}/fd").iterdir()]
    assert lock.acquire(patience=0) is None
    lock.release()


def test_a_process_excludes_itself_and_asking_for_the_holder_keeps_the_lock(tmp_path):
    us, link = f"process {os.getpid()} on {socket.gethostname()}", tmp_path / "link"
    (folder := tmp_path / "folder").mkdir()
    link.symlink_to(folder)
    first, second = FolderLock(folder), FolderLock(link, "build", "choose another folder")
    assert lock_holder(folder) is None and first.acquire() is None
    assert lock_holder(folder) == lock_holder(link) == us
    with pytest.raises(InputError) as refused:
        second.acquire()
    assert str(refused.value) == f"{link}: another build writes here, {us}; wait for its end, or choose another folder"
    second.release()
    ask = f"from pathlib import Path; from fastmae.lock import lock_holder; print(lock_holder(Path({str(folder)!r})))"
    assert subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True).stdout == f"{us}\n"
    first.release()
    assert lock_holder(folder) is None and second.acquire() is None
    second.release()


def test_a_lock_whose_folder_was_removed_by_its_holder_is_not_taken(tmp_path, monkeypatch):
    folder, lockf, calls = tmp_path / "folder", fcntl.lockf, []

    def remove_first(*arguments):  # between the opening of the file and the taking of its lock
        calls.append(1)
        if len(calls) == 1:
            shutil.rmtree(folder)
        lockf(*arguments)

    monkeypatch.setattr(fcntl, "lockf", remove_first)
    lock = FolderLock(folder)
    assert lock.acquire() is None and len(calls) == 2
    assert lock.path.read_bytes() == f"process {os.getpid()} on {socket.gethostname()}".encode()
    lock.release()


@pytest.mark.parametrize("error", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_warned_of_and_the_run_starts(error, shard_folder, tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(error, os.strerror(error))

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "lockf", refuse)
        warning = (lock := FolderLock(tmp_path)).acquire()
        lock.release()
        assert warning == (
            f"{tmp_path}/.lock: this file system has no locks ({os.strerror(error)}); do not start a second run here"
        )
        if error == errno.ENOLCK:
            pretrain(RECIPE, run_of(shard_folder, tmp_path))
            assert warning in capsys.readouterr().out


def test_a_full_disk_does_not_prevent_locking(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    lock = FolderLock(tmp_path)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        with pytest.raises(OSError, match="too large"):
            (tmp_path / "x").write_bytes(b"x")
        assert lock.acquire() is None
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    lock.release()


def test_the_lock_of_a_run_is_released_at_its_end(shard_folder, tmp_path, hold):
    pretrain(RECIPE, run_of(shard_folder, tmp_path))
    hold()


# The command line, patient for half a second; killed in its third step unless it was started again.
PROGRAM = """
import os, signal, sys
from fastmae.model.config import PRESETS
from fastmae.train.cli.main import main
from fastmae.lock import FolderLock, lock_holder
from fastmae.train.pretrain.log import RunLog

PRESETS["tiny"].update(embed_dim=24, depth=2, num_heads=3, decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2)
if "PATIENCE" in os.environ:
    FolderLock.acquire.__defaults__ = (float(os.environ["PATIENCE"]),)
if os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0":
    advance, steps = RunLog.advance, []
    def advance_then_die(self):
        advance(self)
        steps.append(1)
        if len(steps) == 3 and self.is_main:
            os.kill(os.getpid(), signal.SIGKILL)
    RunLog.advance = advance_then_die
sys.exit(main())
"""


def workers_of(process) -> list[int]:
    return [int(n) for p in Path(f"/proc/{process.pid}/task").glob("*/children") for n in p.read_text().split()]


@pytest.mark.cluster
def test_a_second_start_is_refused_until_the_first_is_killed_and_then_resumes(shard_folder, tmp_path):
    program = ("-c", PROGRAM)
    flags = ["--data", shard_folder, *FLAGS, "--batch-size", "8", "--save-every", "2", "--out", tmp_path]
    first = start([*flags, "--steps", "100000"], program=program)
    wait_for(tmp_path / "step-*", first)
    code, text = finish(start([*flags, "--steps", "100000"], program=program, PATIENCE="0.5"))
    assert code == 2, text
    line = next(line for line in text.splitlines() if line.startswith("fastmae: "))
    assert f"{tmp_path}: another run writes here, process {first.pid} on {socket.gethostname()}" in line
    assert first.poll() is None  # and continues
    assert lock_holder(tmp_path) == f"process {first.pid} on {socket.gethostname()}"
    workers = workers_of(first)
    for worker in workers:
        os.kill(worker, signal.SIGSTOP)  # or they would see that it is gone, and end
    first.kill()
    first.wait()
    assert workers and all(Path(f"/proc/{worker}").exists() for worker in workers)
    lock = FolderLock(tmp_path)
    try:
        assert lock_holder(tmp_path) is None and lock.acquire(patience=0) is None
    finally:
        lock.release()
        for worker in workers:
            os.kill(worker, signal.SIGKILL)
    first.communicate()


@pytest.mark.all  # test_survival kills the other process of such a run
@pytest.mark.cluster
def test_torchrun_restarts_killed_processes_and_they_resume(shard_folder, tmp_path):
    script = tmp_path.with_suffix(".py")
    script.write_text(PROGRAM)
    flags = ["--data", shard_folder, *FLAGS, "--steps", "8", "--batch-size", "4", "--save-every", "1", "--out", tmp_path]
    code, text = finish(start(flags, (*TORCHRUN, "2", "--max-restarts", "1"), program=(str(script),)))
    assert code == 0 and "resumed from" in text, text
    assert sorted(losses(tmp_path)) == list(range(1, 9))
