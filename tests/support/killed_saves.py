"""Saves that a kill ends at a moment of the caller's choice; each runs in a process of its own."""

import io
import itertools
import os
import signal
import threading
import time
from pathlib import Path

import torch

from tests.support.saves import save, saver_of, tensors_at

_CALLS = ("fsync", "mkdir", "rename", "replace", "unlink", "rmdir", "remove")


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def save_and_die_at(run, number):
    """Save step 3, and be killed before the call ``number`` to the file system."""
    count = itertools.count(1)

    def before(call, is_counted=lambda *_: True):
        def counted(*arguments, **options):
            if is_counted(*arguments) and next(count) == number:
                die()
            return call(*arguments, **options)

        return counted

    for name in _CALLS:
        setattr(os, name, before(getattr(os, name)))
    io.open = before(io.open, lambda path, mode="r", *_: set(mode) & set("wax+"))
    save(saver_of(run, keep=2), 3)


def save_and_lose_at(run, number):
    """Save step 3, and be killed before the flush ``number``, of which the disk keeps the first half."""
    fsync, count = os.fsync, itertools.count(1)

    def lose(handle):
        path = Path(f"/proc/self/fd/{handle}").readlink()
        if path.is_file() and next(count) == number:
            os.truncate(path, path.stat().st_size // 2)
            die()
        fsync(handle)

    os.fsync = lose
    save(saver_of(run, keep=2), 3)


def save_and_die_after(run, seconds):
    """Save step 3 of some megabytes beside training, and be killed ``seconds`` after it began; or tell how long it took."""
    saver, tensors = saver_of(run, keep=2, asynchronous=True), {**tensors_at(3), "optimizer/big": torch.ones(2 << 20)}
    if seconds is not None:
        threading.Thread(target=lambda: (time.sleep(seconds), die()), daemon=True).start()
    began = time.perf_counter()
    save(saver, 3, tensors)
    saver.wait()
    if seconds is not None:
        time.sleep(60)
    (run / "seconds").write_text(str(time.perf_counter() - began))
