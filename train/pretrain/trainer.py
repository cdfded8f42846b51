"""One process of a run: its model, optimizer, data and logs, and the loop over its steps."""

import contextlib
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch

import fastmae
from fastmae.errors import CheckpointError, DataError, DivergedError
from fastmae.model.mae import MAE
from fastmae.train.checkpoint.format import SCHEMA
from fastmae.train.checkpoint.resume import check_resume, choose_checkpoint, plain_settings, restore
from fastmae.train.checkpoint.saver import Saver
from fastmae.train.checkpoint.state import random_state, run_tensors
from fastmae.train.config.agreement import agree
from fastmae.train.config.precision import AUTOCAST, precision_of
from fastmae.train.config.recipes import Recipe
from fastmae.train.config.run import Run
from fastmae.train.distributed.replica_check import check_replicas
from fastmae.train.distributed.signals import StopSignals
from fastmae.train.distributed.watch import WATCHED, Watch
from fastmae.train.distributed.world import World
from fastmae.train.pretrain.attention_choice import choose_attention
from fastmae.train.pretrain.events import Incidents
from fastmae.train.pretrain.log import RunLog
from fastmae.train.pretrain.meter import Meter
from fastmae.train.pretrain.open_data import open_data
from fastmae.train.pretrain.previews import Drawing
from fastmae.train.pretrain.summary import environment, overview
from fastmae.train.step.allocator import keep_freed_memory
from fastmae.train.step.compile_cache import CompileCache
from fastmae.train.step.compiler import first_step
from fastmae.train.step.cuda_graph import GraphedStep
from fastmae.train.step.loss_module import LossModule
from fastmae.train.step.loss_scale import LossScale
from fastmae.train.step.optimizer import learning_rate, make_optimizer
from fastmae.train.step.parallelize import groups_of, parallelize
from fastmae.train.step.spikes import SpikeDetector
from fastmae.train.step.step import MicroBatch, Step


class Trainer:
    """One process of a run: model, optimizer, data and logs, and the loop over them."""

    def __init__(self, recipe: Recipe, run: Run, world: World, watch: Watch, signals: StopSignals, source: str):
        self.recipe, self.run, self.world, self.watch, self.signals = recipe, run, world, watch, signals
        self.accumulate = agree(recipe, run, world.size)
        self.precision = precision_of(run.precision, world.device.type)
        autocast = AUTOCAST[self.precision]
        self.checkpoint, self.notes = choose_checkpoint(run, world)
        self.attention = choose_attention(recipe, autocast or torch.float32, world, self.checkpoint)
        if world.device.type == "cpu":
            keep_freed_memory()
        torch.manual_seed(recipe.seed)
        self.model = MAE(recipe.model).to(world.device)
        for _, size in recipe.progressive:
            self.model.add_size(size)
        module = parallelize(LossModule(self.model), world, how=run.parallel, compile=run.compile, reduce=run.reduce)
        self.groups = groups_of(module)
        world.set_timeout(WATCHED, self.groups)
        self.optimizer = make_optimizer(self.model, recipe.weight_decay, recipe.betas)
        scale = LossScale(world.device) if self.precision == "fp16" else None
        # On the device where the step itself leaves out spikes; else they are looked for when the losses are read.
        self.detector = SpikeDetector(run.spike_z, world.device if run.skip_spikes else torch.device("cpu"))
        kind = GraphedStep if run.cuda_graphs else Step
        self.step = kind(module, self.optimizer, patch_size=recipe.model.patch_size, mask_ratio=recipe.mask_ratio,
                         seed=recipe.seed, autocast=autocast, scale=scale, mean=world.mean,
                         spikes=self.detector if run.skip_spikes else None)  # fmt: skip
        self.tensors = run_tensors(self.model, self.optimizer, spikes=self.detector.tensors(), step=self.step.tensors(),
                                   **({"loss_scale": scale.tensors()} if scale else {}))  # fmt: skip
        self.cache = CompileCache(recipe, run, world)
        self.notes += self.cache.load()
        state = self._resume() if self.checkpoint else None
        self.notes += self.attention.notes
        self.first_step = state["step"] if state else 0
        self.data, self.total_steps = open_data(recipe, run, world, source, state and state["data"])
        self.warmup_steps = self.total_steps * recipe.warmup_epochs / recipe.epochs
        self.drawing = Drawing(source, self.model, world, recipe.mask_ratio, autocast) if run.draw_every else None
        self.saver = Saver(run.out, recipe.model, world, keep=run.keep, keep_every=run.keep_every, asynchronous=run.async_save)
        self.saver.newest = self.checkpoint and self.checkpoint.folder
        self.stopped_by: str | None = None

    def train(self) -> Path:
        """The loop. Returns the newest checkpoint."""
        run, recipe, world = self.run, self.recipe, self.world
        log = RunLog(run.out, is_main=world.is_main, first_step=self.first_step, total_steps=self.total_steps, wandb=run.wandb)
        incidents = Incidents(log, world, run.out, self.detector, skips_spikes=run.skip_spikes, max_skips=run.max_skips,
                              precision=self.precision)  # fmt: skip
        meter = Meter(world, recipe.model, recipe.mask_ratio, recipe.effective_batch)
        batches = self._micro_batches(meter, incidents)
        try:
            self._begin(log)
            return self._loop(batches, meter, incidents, log)
        except DataError as error:
            for line in dict.fromkeys([*incidents.deaths, *incidents.replaced, *getattr(error, "__notes__", ())]):
                print(line, file=sys.stderr)  # each process its own: the run's log is the main one's
            self._let_save_end()
            raise
        except DivergedError:
            self._let_save_end()
            raise
        except CheckpointError:
            incidents.tell_saves(self.saver.ended())
            raise
        finally:
            batches.close()  # ends the loader's processes
            log.close()

    def _let_save_end(self) -> None:
        """All processes end with an error: what is being written is still good."""
        with contextlib.suppress(CheckpointError):
            self.saver.wait()

    def _begin(self, log: RunLog) -> None:
        recipe, run = self.recipe, self.run
        parameters = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        lines = overview(recipe, run, self.world, self.data, parameters=parameters, precision=self.precision,
                         attention=self.attention.text, accumulate=self.accumulate, total_steps=self.total_steps,
                         warmup_steps=self.warmup_steps, done=self.first_step)  # fmt: skip
        for line in self.notes + lines:
            log.say(line)
        log.event(
            "start",
            step=self.first_step,
            total_steps=self.total_steps,
            recipe={**plain_settings(recipe), "model": asdict(recipe.model)},
            run={name: str(v) if isinstance(v, Path) else v for name, v in asdict(run).items()},
            world=self.world.size,
            parallel=run.parallel,
            attention=self.attention.text,
            environment=environment(self.world),
            resumed_from=self.checkpoint and str(self.checkpoint.folder),
        )

    def _loop(self, batches: Iterator[MicroBatch], meter: Meter, incidents: Incidents, log: RunLog) -> Path:
        run, done, saved = self.run, self.first_step, self.first_step if self.checkpoint else None
        shape = None
        look_every = min(run.log_every, run.max_skips)
        while done < self.total_steps:
            self.watch.beat(done, "reading data", slow=done == self.first_step)
            taken, failure = self._take(batches)
            is_new = bool(taken) and taken[0].images.shape != shape  # the first ones of a size are compiled for
            if not self._may_step(failure):
                break
            lr = self.learning_rate(done)
            self.watch.beat(done, "in a step", slow=is_new)
            shape = taken[0].images.shape
            incidents.remember(done + 1, taken)
            is_first = done == self.first_step
            meter.add(first_step(self.step, taken, lr, world=self.world, how=run.compile) if is_first else self.step(taken, lr))
            log.advance()
            done += 1
            for line in self.cache.save() if is_new else ():
                log.say(line)
            is_last = done == self.total_steps
            is_diverged = done % look_every == 0 and int(self.step.skipped) >= run.max_skips
            saves = done % run.save_every == 0 or is_last
            # Before a save too: what is found in the losses is part of it.
            if done % run.log_every == 0 or saves or is_diverged:
                self._look(done, lr, meter, incidents, log)
            if run.check_replicas and done % run.check_replicas == 0:
                check_replicas(self.model, self.world, done)
            if self.drawing and (done % run.draw_every == 0 or is_last):
                self.watch.beat(done, "drawing", slow=True)
                self.drawing.draw(done, log)
            if saves:
                self._save(done)
                saved = done
            incidents.tell_saves(self.saver.ended())
        return self._finish(done, saved, meter, incidents, log)

    def _finish(self, done: int, saved: int | None, meter: Meter, incidents: Incidents, log: RunLog) -> Path:
        if meter.results:
            self._look(done, self.learning_rate(done - 1), meter, incidents, log)
        if saved != done:
            self._save(done)
        self.watch.beat(done, "waiting for the checkpoint", slow=True)
        self.saver.wait()
        incidents.tell_saves(self.saver.ended())
        if self.saver.error:
            raise CheckpointError(f"the checkpoint of step {done} could not be written: {self.saver.error}")
        if self.stopped_by:
            log.say(f"stopped by {self.stopped_by} after step {done}; the same command continues from {self.saver.newest}")
            log.event("stopped", step=done, reason=self.stopped_by)
        else:
            log.say(f"done: {done} steps, {self.saver.newest}")
        log.event("end", step=done)
        return self.saver.newest

    def learning_rate(self, step: int) -> float:
        """That of ``step``, counted from 0."""
        return learning_rate(step, self.total_steps, self.warmup_steps, self.recipe.lr, self.recipe.min_lr)

    def _take(self, batches: Iterator[MicroBatch]) -> tuple[list[MicroBatch], DataError | None]:
        """The micro-batches of a step, or why they cannot be had."""
        try:
            return [next(batches) for _ in range(self.accumulate)], None
        except DataError as error:
            return [], error

    def _may_step(self, failure: DataError | None) -> bool:
        """One vote before each step, so that all processes take it or none does. Raises DataError if one lacks its data."""
        signal = self.signals.received
        failed, asked = self.world.any(failure is not None, signal is not None)
        if failed:
            raise failure or DataError("another process of this run could not read its data; it says why")
        if asked:
            named = self.world.gather(
                [f"{signal} on rank {self.world.rank}" if self.world.size > 1 else signal] if signal else []
            )
            self.stopped_by = named[0] + (f" and {len(named) - 1} others" if len(named) > 1 else "")
        return not asked

    def _micro_batches(self, meter: Meter, incidents: Incidents) -> Iterator[MicroBatch]:
        source = iter(self.data)
        while True:
            began = time.perf_counter()
            batch = next(source)
            meter.waited += time.perf_counter() - began
            incidents.note(batch)
            if self.drawing:
                self.drawing.offer(batch.images)
            yield MicroBatch(batch.images, batch.sample_ids, batch.epochs)

    def _look(self, done: int, lr: float, meter: Meter, incidents: Incidents, log: RunLog) -> None:
        """Read what the last steps have given, which waits for the device, and tell it."""
        values, steps = meter.read()
        epoch = done * self.recipe.effective_batch / self.data.source.samples if self.data.source.samples else 0.0
        log.measurements(done, epoch=epoch, lr=lr, **values)
        incidents.tell(done, steps)

    def _resume(self) -> dict:
        """Fill the run from the checkpoint; return its state."""
        self.notes += [f"resumed from {self.checkpoint.folder}", *check_resume(self.checkpoint, self.recipe)]
        restore(self.checkpoint, self.tensors, self.world)
        return self.checkpoint.state

    def _save(self, step: int) -> None:
        self.watch.beat(step, "saving", slow=True)
        state = {
            "schema": SCHEMA,
            "step": step,
            "total_steps": self.total_steps,
            "data": self.data.state(step * self.recipe.effective_batch),
            "schedule": {"lr": self.learning_rate(min(step, self.total_steps - 1)), "warmup_steps": self.warmup_steps},
            "model": self.recipe.model.to_json(),
            "recipe": plain_settings(self.recipe),
            "attention": self.attention.state(),
            "processes": self.world.size,
            "parallel": self.run.parallel,
            "versions": {"fastmae": fastmae.__version__, "torch": torch.__version__},
        }
        self.saver.begin(step, self.tensors, random_state(self.world), state)
