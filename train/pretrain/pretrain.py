"""Pretrain: shards in, checkpoints out; stopped and resumed at any step, on CPUs with the same bits."""

import math
import os
from dataclasses import replace
from pathlib import Path

import torch
from torch.distributed import DistError

from fastmae.cores import cpu_quota
from fastmae.errors import LostProcessError, RequeueError
from fastmae.files import make_folder
from fastmae.lock import FolderLock
from fastmae.train.checkpoint.disk_space import bytes_of_checkpoint, check_room
from fastmae.train.config.recipes import Recipe
from fastmae.train.config.resumed import write_settings
from fastmae.train.config.run import Run
from fastmae.train.console import outlived
from fastmae.train.distributed.background import Background
from fastmae.train.distributed.join import join_world, leave_world
from fastmae.train.distributed.launcher import default_workers, read_launcher
from fastmae.train.distributed.shared_folder import check_shared
from fastmae.train.distributed.signals import StopSignals
from fastmae.train.distributed.watch import Watch
from fastmae.train.distributed.world import World, is_of_collective
from fastmae.train.pretrain.attention_choice import probe_attention
from fastmae.train.pretrain.out_of_memory import out_of_memory
from fastmae.train.pretrain.setup import Setup, set_up
from fastmae.train.pretrain.staging import stage_data
from fastmae.train.pretrain.trainer import Trainer
from fastmae.train.step.compile_cache import use_local_folders
from fastmae.train.step.compiler import advise_off, compiler_error


def pretrain(recipe: Recipe, run: Run) -> Path:
    """Train to the end of ``recipe`` or until a signal; return the newest checkpoint.

    Raises InputError or DataError on wrong settings or data, DivergedError if gradients stay non-finite, LostProcessError if
    another rank is gone, CheckpointError if none can be written, RequeueError after a signal if ``run.requeue_exit``.
    After a signal those that follow are ignored (``StopSignals``).
    """
    make_folder(run.out)
    with outlived(), StopSignals() as signals:
        world, given = _join(recipe, run, signals), run
        _keep_to_quota(world)
        if run.workers is None:
            counted = world.local_size if read_launcher().local_size is None else None
            run = replace(run, workers=default_workers(counted))
        use_local_folders(world.device)
        lock = FolderLock(run.out)
        try:
            warning = world.by_main(lock.acquire)
            check_shared(run.out, world)
            watch = Watch(world, run.out, first=run.first_timeout, later=run.timeout)
            try:
                data, lines = stage_data(run, world, watch, signals)
                setup = set_up(recipe, run, world, data)
                short = world.by_main(lambda: _check_room(setup))
                setup.notes.extend(line for line in (warning, *lines, short) if line)
                world.by_main(lambda: write_settings(recipe, given))
                trainer = Trainer(setup, watch, signals)
                folder = trainer.train()
            except BaseException as error:
                known = out_of_memory(error, recipe, run, world, watch.doing) or compiler_error(error, run, world)
                if known is None:
                    _name_the_lost(error, watch)
                    advise_off(error, run)
                watch.heartbeat.fail(known or error)
                if known is None:
                    raise
                raise known from error
            finally:
                watch.end()
            world.set_timeout(run.timeout)  # no watch any more
            world.barrier()  # rank 0 hosts the store that the others' watches read
            leave_world()  # not after a fault: it would wait for lost ranks
        finally:
            lock.release()
    if trainer.stopped_by and run.requeue_exit:
        raise RequeueError(f"stopped by {trainer.stopped_by}; {folder} is saved; start the same command again to continue")
    return folder


def _keep_to_quota(world: World) -> None:
    """As many of torch's threads as the container's CPU quota, shared among its processes, unless OMP_NUM_THREADS is set: more
    would be stopped, all together, for the rest of each period."""
    quota = cpu_quota()
    if quota is not None and not os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(min(torch.get_num_threads(), max(1, math.ceil(quota) // world.local_size)))


def _join(recipe: Recipe, run: Run, signals: StopSignals) -> World:
    """Join the run's other ranks; before that rank 0 probes attention. A signal until then ends this process at once: there is
    nothing to save."""

    def look(_: float) -> None:
        if signals.received:
            raise KeyboardInterrupt(f"stopped by {signals.received} while attention backends were probed")

    try:
        Background(lambda: probe_attention(recipe, run)).wait(look)
        return join_world(run.device, run.first_timeout, lambda: signals.received)
    except KeyboardInterrupt as interrupt:
        if run.requeue_exit and signals.received:
            raise RequeueError(f"{interrupt}; nothing has been trained; start the same command again") from None
        raise


def _check_room(setup: Setup) -> str | None:
    """As ``check_room``, for the checkpoints of this run."""
    return check_room(setup.run, bytes_of_checkpoint(setup.tensors), world_size=setup.world.size, first_step=setup.first_step,
                      total_steps=setup.total_steps)  # fmt: skip


def _name_the_lost(error: BaseException, watch: Watch) -> None:
    """Raise LostProcessError if ``error`` is what a collective raises when a process is gone, naming which."""
    is_lost = isinstance(error, LostProcessError) or (type(error) in (RuntimeError, DistError) and is_of_collective(error))
    if is_lost and (lost := watch.heartbeat.lost_at_fault()):
        raise LostProcessError(f"{lost}, after step {watch.step}, while {watch.doing}") from error
