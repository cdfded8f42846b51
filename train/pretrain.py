"""Pretrain: shards in, checkpoints out; stopped and resumed at any step, on CPUs with the same bits."""

from pathlib import Path

from torch.distributed import DistError

from fastmae.errors import LostProcessError, RequeueError
from fastmae.files import make_folder
from fastmae.train.compile_cache import use_local_folders
from fastmae.train.lock import RunLock
from fastmae.train.recipes import Recipe
from fastmae.train.run import Run
from fastmae.train.shared_folder import check_shared
from fastmae.train.signals import StopSignals
from fastmae.train.staging import stage_data
from fastmae.train.trainer import Trainer
from fastmae.train.watch import Watch
from fastmae.train.world import is_of_collective, join_world, leave_world


def pretrain(recipe: Recipe, run: Run) -> Path:
    """Train to the end of ``recipe`` or until a signal; return the newest checkpoint.

    Raises InputError or DataError on wrong settings or data, DivergedError if gradients stay non-finite, LostProcessError if
    another process is gone, CheckpointError if none can be written, RequeueError after a signal if ``run.requeue_exit``.
    After a signal those that follow are ignored (``StopSignals``).
    """
    make_folder(run.out)
    with StopSignals() as signals:
        world = join_world(run.device, run.first_timeout)
        use_local_folders(world.device)
        lock = RunLock(run.out)
        try:
            warning = world.by_main(lock.acquire)
            check_shared(run.out, world)
            watch = Watch(world, run.out, first=run.first_timeout, later=run.timeout)
            try:
                data, lines = stage_data(run, world, watch, signals)
                trainer = Trainer(recipe, run, world, watch, signals, data)
                trainer.notes += [warning, *lines] if warning else lines
                folder = trainer.train()
            except BaseException as error:
                _name_the_lost(error, watch)
                watch.vitals.fail(error)
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


def _name_the_lost(error: BaseException, watch: Watch) -> None:
    """Raise LostProcessError if ``error`` is what a collective raises when a process is gone, naming which."""
    is_lost = isinstance(error, LostProcessError) or (type(error) in (RuntimeError, DistError) and is_of_collective(error))
    if is_lost and (lost := watch.vitals.lost_at_fault()):
        raise LostProcessError(f"{lost}, after step {watch.step}, while {watch.doing}") from error
