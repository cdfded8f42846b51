"""Pretrain: shards in, checkpoints out; stopped and resumed at any step, on CPUs with the same bits."""

import re
from pathlib import Path

from fastmae.errors import LostProcessError, RequeueError
from fastmae.files import make_folder
from fastmae.train.lock import RunLock
from fastmae.train.recipes import Recipe
from fastmae.train.run import Run
from fastmae.train.signals import StopSignals
from fastmae.train.trainer import Trainer
from fastmae.train.watch import Watch
from fastmae.train.world import join_world, leave_world


def pretrain(recipe: Recipe, run: Run) -> Path:
    """Train to the end of ``recipe`` or until a signal; return the newest checkpoint.

    Raises InputError or DataError on wrong settings or data, DivergedError if gradients stay non-finite, LostProcessError if
    another process is gone, CheckpointError if none can be written, RequeueError after a signal if ``run.requeue_exit``.
    """
    make_folder(run.out)
    with StopSignals() as signals:
        world = join_world(run.device, run.first_timeout)
        lock = RunLock(run.out)
        try:
            warning = world.by_main(lock.acquire)
            watch = Watch(world, run.out, first=run.first_timeout, later=run.timeout)
            try:
                trainer = Trainer(recipe, run, world, watch, signals)
                trainer.notes += [warning] if warning else []
                folder = trainer.train()
            except RuntimeError as error:
                _name_the_lost(error, watch)
                raise
            finally:
                watch.end()
            world.barrier()  # the main process keeps what the others' watches ask for
            leave_world()  # not after a fault: it would wait for the lost
        finally:
            lock.release()
    if trainer.stopped_by and run.requeue_exit:
        raise RequeueError(f"stopped by {trainer.stopped_by}; {folder} is saved, and the run wants to go on")
    return folder


def _name_the_lost(error: RuntimeError, watch: Watch) -> None:
    """Raise LostProcessError if ``error`` is what a collective raises when a process is gone, naming which."""
    words = re.search("gloo|nccl|connection|socket|peer|timed out", str(error), re.IGNORECASE)
    if (isinstance(error, LostProcessError) or words) and (lost := watch.vitals.lost_at_fault()):
        raise LostProcessError(f"{lost} of this run is lost, after step {watch.step}, while {watch.doing}") from error
