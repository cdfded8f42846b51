"""What goes wrong on purpose: functions that a process of a ``Crew`` calls before it begins, given its rank.

Bind all but the rank by ``functools.partial``. Steps count from 1, in each process from its start.
"""

import ctypes
import os
import resource
import signal
import threading
import time
from pathlib import Path

import torch

from fastmae.data.crops import Cropper
from fastmae.train.checkpoint import saver
from fastmae.train.distributed import heartbeat, rendezvous, watch, world
from fastmae.train.pretrain import pretrain
from fastmae.train.pretrain.log import RunLog
from fastmae.train.step.loss_module import LossModule
from fastmae.train.step.step import Step

FOREVER = 3600  # seconds


def before_step(act, rank, on=None, at=None):
    """Call ``act()`` before each step, or that numbered ``at``, on each rank, or that numbered ``on``."""
    run, count = Step.run, []

    def noted(self, batches):
        count.append(1)
        if on in (None, rank) and at in (None, len(count)):
            act()
        return run(self, batches)

    Step.run = noted


def slow_steps(seconds, rank):
    before_step(lambda: time.sleep(seconds), rank)


def sleep_at(step, on, rank):
    def act():
        print("asleep", flush=True)
        time.sleep(FOREVER)

    before_step(act, rank, on, step)


def hold_interpreter():
    """As a call into C does that never gives Python's lock back; one that a signal does not end."""
    ours, _ = os.pipe()
    ctypes.PyDLL(None).read(ours, ctypes.create_string_buffer(1), 1)


def hold_interpreter_at(step, on, rank):
    before_step(hold_interpreter, rank, on, step)


def raise_at(step, on, rank):
    def act():
        raise TypeError("a fault of ours")

    before_step(act, rank, on, step)


def out_of_memory_at(step, on, rank):
    """For real: more than any machine has."""
    before_step(lambda: torch.empty(1 << 50), rank, on, step)


def count_steps(folder, rank):
    """A file of as many bytes as this rank has begun steps."""

    def act():
        with Path(folder / f"steps-of-rank-{rank}").open("a") as file:
            file.write(".")

    before_step(act, rank)


def change_loss(change, first, last, on, rank):
    """Pass the losses of the steps ``first`` to ``last`` on rank ``on`` through ``change``."""
    run, loss, count = Step.run, Step.loss, []

    def noted(self, batches):
        count.append(1)
        self.is_changed = rank == on and first <= len(count) <= last
        return run(self, batches)

    Step.run = noted
    Step.loss = lambda self, batch: change(loss(self, batch)) if getattr(self, "is_changed", False) else loss(self, batch)


def to_nan(loss):
    return loss * torch.nan


def with_nan_gradient(loss):
    """``loss`` itself, and no gradient that could be used."""
    loss.register_hook(lambda gradient: gradient * torch.nan)
    return loss


def huge(loss):
    return loss * 1000


def stuck_loader(on, rank):
    """The loader's workers of rank ``on`` stop at their third task."""
    crop, count = Cropper.__call__, []

    def stuck(self, *arguments):
        count.append(1)
        if rank == on and len(count) == 3:
            time.sleep(FOREVER)
        return crop(self, *arguments)

    Cropper.__call__ = stuck


def slow_save(seconds, rank):
    write = saver.write_tensors

    def slow(*arguments):
        time.sleep(seconds)
        return write(*arguments)

    saver.write_tensors = slow


def slow_start(seconds, rank):
    join = pretrain.join_world

    def slow(*arguments):
        world = join(*arguments)
        print("joined", flush=True)
        time.sleep(seconds)
        return world

    pretrain.join_world = slow


def never_join(on, rank):
    """Rank ``on`` does not come; the others report it at once."""
    rendezvous.FIRST_REPORT = 0.1
    if rank == on:
        time.sleep(FOREVER)


def never_connect(on, rank):
    """Rank ``on`` takes part in the rendezvous, but not in what torch does then."""
    make = world.dist.init_process_group

    def hang(*arguments, **options):
        print("connects", flush=True)
        if rank == on:
            time.sleep(FOREVER)
        return make(*arguments, **options)

    world.dist.init_process_group = hang


def quick_watch(seconds, rank):
    """Processes count as lost after ``seconds`` without a heartbeat, and no collective waits longer than its timeout."""
    world.SLACK = 0.0
    watch._LOST_AFTER = watch._LOST_AT_START = seconds
    heartbeat._AT_FAULT = min(seconds, heartbeat._AT_FAULT)


def small_files(seconds, on, rank):
    """For as long as that, from the third step on, rank ``on`` can write no file above a few bytes: a full disk."""

    def act():
        _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, most))
        threading.Timer(seconds, resource.setrlimit, (resource.RLIMIT_FSIZE, (most, most))).start()

    before_step(act, rank, on, 3)


def all_of(faults, rank):
    """Several at once."""
    for fault in faults:
        fault(rank)


def load():
    """Seconds that a busy machine may take longer."""
    return 5 * os.getloadavg()[0]


def kill_after(steps, seconds, rank):
    """kill -9, so many seconds after so many steps."""
    advance, count = RunLog.advance, []

    def noted(self):
        advance(self)
        count.append(1)
        if len(count) == steps:
            threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()

    RunLog.advance = noted


def damage_weights(damage, step, on, rank):
    """Call ``damage`` with the model of rank ``on`` before a step."""
    make, models = LossModule.__init__, []

    def noted(self, model):
        models.append(model)
        make(self, model)

    LossModule.__init__ = noted
    before_step(lambda: damage(models[-1]), rank, on, step)
