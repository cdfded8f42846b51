"""The loop of one rank over its steps: read, step, log, draw, save, until the end, a signal or an error."""

import contextlib
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from fastmae.errors import CheckpointError, DataError, DivergedError
from fastmae.train.checkpoint.saver import Saver
from fastmae.train.checkpoint.state import random_state
from fastmae.train.distributed.replica_check import check_replicas
from fastmae.train.distributed.signals import StopSignals
from fastmae.train.distributed.watch import Watch
from fastmae.train.pretrain.events import Events
from fastmae.train.pretrain.log import RunLog
from fastmae.train.pretrain.meter import Meter
from fastmae.train.pretrain.setup import Setup
from fastmae.train.pretrain.summary import start_event, summary
from fastmae.train.step.compiler import first_step
from fastmae.train.step.loss_module import MicroBatch


class Trainer:
    """Trains what ``setup`` has made, whatever its task. All ranks call ``train`` together."""

    def __init__(self, setup: Setup, watch: Watch, signals: StopSignals):
        self.setup, self.watch, self.signals = setup, watch, signals
        self.run, self.world = setup.run, setup.world
        run, world = setup.run, setup.world
        self.saver = Saver(run.out, setup.recipe.model, world, keep=run.keep, keep_every=run.keep_every,
                           asynchronous=run.async_save)  # fmt: skip
        self.saver.newest = setup.checkpoint and setup.checkpoint.folder
        self.stopped_by: str | None = None
        """The signal that ended ``train`` before the last step."""

    def train(self) -> Path:
        """Take the steps that are left; return the newest checkpoint.

        Raises DivergedError after too many consecutive skipped updates, DataError if a rank lacks its data, CheckpointError if
        no checkpoint can be written.
        """
        setup, run, world = self.setup, self.run, self.world
        log = RunLog(
            run.out, is_main=world.is_main, first_step=setup.first_step, total_steps=setup.total_steps, wandb=run.wandb
        )
        events = Events(log, run, world, setup.precision)
        meter = Meter(world, setup.task.flops, setup.recipe.effective_batch)
        batches = self._micro_batches(meter, events)
        try:
            for line in setup.notes + summary(setup):
                log.line(line)
            log.event("start", **start_event(setup))
            return self._loop(batches, meter, events, log)
        except DataError as error:
            for line in dict.fromkeys([*events.deaths, *events.replaced, *getattr(error, "__notes__", ())]):
                print(line, file=sys.stderr)  # each rank its own: the run's log is rank 0's
            self._finish_save()
            raise
        except DivergedError:
            self._finish_save()
            raise
        except CheckpointError:
            events.log_saves(self.saver.ended())
            raise
        finally:
            batches.close()  # ends the loader's workers
            log.close()

    def _finish_save(self) -> None:
        """All ranks end with an error: the checkpoint that is being written is still good."""
        with contextlib.suppress(CheckpointError):
            self.saver.wait()

    def _loop(self, batches: Iterator[MicroBatch], meter: Meter, events: Events, log: RunLog) -> Path:
        setup, run, done = self.setup, self.run, self.setup.first_step
        saved, shape, look_every = (done if setup.checkpoint else None), None, min(run.log_every, run.max_skips)
        meter.clear()
        while done < setup.total_steps:
            is_first = done == setup.first_step
            self.watch.beat(done, "reading data", slow=is_first)
            taken, failure = self._take(batches)
            is_new = bool(taken) and taken[0].images.shape != shape  # the first ones of a size are compiled for
            if not self._may_step(failure):
                break
            lr = setup.learning_rate(done)
            self.watch.beat(done, "in a step", slow=is_new)
            shape = taken[0].images.shape
            events.remember(done + 1, taken)
            step = partial(first_step, setup.step, world=self.world, how=run.compile) if is_first else setup.step
            meter.add(step(taken, lr))
            log.advance()
            done += 1
            for line in setup.cache.save() if is_new else ():
                log.line(line)
            is_last = done == setup.total_steps
            is_diverged = done % look_every == 0 and int(setup.step.skipped) >= run.max_skips
            saves = done % run.save_every == 0 or is_last
            if is_first or done % run.log_every == 0 or saves or is_diverged:
                self._log_steps(done, lr, meter, events, log, is_first=is_first)
            if run.check_replicas and done % run.check_replicas == 0:
                check_replicas(setup.model, self.world, done)
            if setup.drawing and (done % run.draw_every == 0 or is_last):
                self.watch.beat(done, "drawing", slow=True)
                setup.drawing.draw(done, log)
            if saves:
                self._save(done)
                saved = done
            events.log_saves(self.saver.ended())
        return self._finish(done, saved, meter, events, log)

    def _finish(self, done: int, saved: int | None, meter: Meter, events: Events, log: RunLog) -> Path:
        if meter.results:
            self._log_steps(done, self.setup.learning_rate(done - 1), meter, events, log)
        if saved != done:
            self._save(done)
        self.watch.beat(done, "waiting for the checkpoint", slow=True)
        self.saver.wait()
        events.log_saves(self.saver.ended())
        if self.saver.error:
            raise CheckpointError(f"the checkpoint of step {done} could not be written: {self.saver.error}")
        if self.stopped_by:
            log.line(f"stopped by {self.stopped_by} after step {done}; the same command continues from {self.saver.newest}")
            log.event("stopped", step=done, reason=self.stopped_by)
        else:
            log.line(f"done: {done} steps, {self.saver.newest}")
        log.event("end", step=done)
        return self.saver.newest

    def _take(self, batches: Iterator[MicroBatch]) -> tuple[list[MicroBatch], DataError | None]:
        """The micro-batches of a step, or why they cannot be had."""
        try:
            return [next(batches) for _ in range(self.setup.accumulate)], None
        except DataError as error:
            return [], error

    def _may_step(self, failure: DataError | None) -> bool:
        """One vote before each step, so that all ranks take it or none does. Raises DataError if one lacks its data."""
        signal = self.signals.received
        failed, asked = self.world.any(failure is not None, signal is not None)
        if failed:
            raise failure or DataError("another rank could not read its data; the reason is in that rank's output")
        if asked:
            named = self.world.gather(
                [f"{signal} on rank {self.world.rank}" if self.world.size > 1 else signal] if signal else []
            )
            self.stopped_by = named[0] + (f" and {len(named) - 1} others" if len(named) > 1 else "")
        return not asked

    def _micro_batches(self, meter: Meter, events: Events) -> Iterator[MicroBatch]:
        source = iter(self.setup.loader)
        while True:
            began = time.perf_counter()
            batch = next(source)
            meter.waited += time.perf_counter() - began
            events.note(batch)
            if self.setup.drawing:
                self.setup.drawing.offer(batch.images)
            yield self.setup.task.micro_batch(batch)

    def _log_steps(self, done: int, lr: float, meter: Meter, events: Events, log: RunLog, is_first: bool = False) -> None:
        """Read the results of the last steps, which waits for the device, and log them."""
        values, steps = meter.read(is_first)
        samples = self.setup.loader.source.samples
        epoch = done * self.setup.recipe.effective_batch / samples if samples else 0.0
        log.measurements(done, epoch=epoch, lr=lr, **values)
        events.log_steps(done, steps)

    def _save(self, step: int) -> None:
        self.watch.beat(step, "saving", slow=True)
        self.saver.begin(step, self.setup.tensors, random_state(self.world), self.setup.state(step))
