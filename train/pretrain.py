"""Pretrain: shards in, checkpoints out; stopped and resumed at any step, on CPUs with the same bits."""

import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

import fastmae
from fastmae.data.batch import Batch
from fastmae.errors import DataError, DivergedError, InputError
from fastmae.files import make_folder
from fastmae.mae import MAE
from fastmae.train.backend import choose_attention
from fastmae.train.checkpoint import checkpoint_folder, load_checkpoint, save_checkpoint
from fastmae.train.feed import open_data
from fastmae.train.graph import GraphedStep
from fastmae.train.log import RunLog
from fastmae.train.memory import keep_freed_memory
from fastmae.train.meter import Meter
from fastmae.train.optimizer import learning_rate, make_optimizer
from fastmae.train.parallel import World, join_world, leave_world, share_gradients
from fastmae.train.recipes import Recipe
from fastmae.train.resume import check_resume, choose_checkpoint, plain_settings
from fastmae.train.run import Run, accumulation
from fastmae.train.step import LossModule, MicroBatch, Step, compiled

MAX_SKIPPED = 20  # updates left out on end before a run is called diverged
_REPEATED_SIGNAL = 5.0  # seconds; launchers and clusters send the same signal twice within moments


def pretrain(recipe: Recipe, run: Run) -> Path:
    """Train to the end of ``recipe`` or until a signal; return the newest checkpoint.

    Raises InputError or DataError on wrong settings or data, DivergedError if gradients stay non-finite.
    """
    make_folder(run.out)
    world = join_world(run.device)
    try:
        return Trainer(recipe, run, world).train()
    finally:
        leave_world()


class Trainer:
    """One process of a run: model, optimizer, data and logs, and the loop over them."""

    def __init__(self, recipe: Recipe, run: Run, world: World):
        self.recipe, self.run, self.world = recipe, run, world
        self.accumulate = accumulation(recipe.effective_batch, run.batch_size, world.size)
        self.autocast = _autocast(run, world)
        sizes = [size for _, size in recipe.progressive]
        self.attention = choose_attention(recipe.model, sizes, recipe.mask_ratio, self.autocast or torch.float32, world)
        if world.device.type == "cpu":
            keep_freed_memory()
        torch.manual_seed(recipe.seed)
        self.model = MAE(recipe.model).to(world.device)
        self.optimizer = make_optimizer(self.model, recipe.weight_decay, recipe.betas)
        self.checkpoint, self.notes = choose_checkpoint(run, world)
        self.state = self._resume() if self.checkpoint else None
        self.first_step = self.state["step"] if self.state else 0
        self.data, self.total_steps = open_data(recipe, run, world, self.state and self.state["data"])
        for size in sizes:
            self.model.add_size(size)
        self.warmup_steps = self.total_steps * recipe.warmup_epochs / recipe.epochs
        # DDP takes its first weights from rank 0, so it wraps a model that is loaded already.
        module = share_gradients(compiled(LossModule(self.model), run.compile, world.size), world)
        if run.cuda_graphs and recipe.progressive:
            raise InputError("cuda graphs keep one image size; leave out --cuda-graphs or --progressive")
        kind = GraphedStep if run.cuda_graphs else Step
        self.step = kind(module, self.optimizer, patch_size=recipe.model.patch_size, mask_ratio=recipe.mask_ratio,
                         seed=recipe.seed, autocast=self.autocast)  # fmt: skip
        self.replaced: list[str] = []
        self.deaths: list[str] = []
        self.left_out = 0
        self.stop_asked_at: float | None = None

    def train(self) -> Path:
        """The loop. Returns the newest checkpoint."""
        log = RunLog(self.run.out, is_main=self.world.is_main, first_step=self.first_step, total_steps=self.total_steps)
        for line in self.notes + self._describe():
            log.say(line)
        settings = {**plain_settings(self.recipe), "model": self.recipe.model.to_json()}
        log.event("start", step=self.first_step, recipe=settings, world=self.world.size)
        previous = {s: signal.signal(s, self._on_signal) for s in (signal.SIGTERM, signal.SIGINT)}
        meter = Meter(self.world, self.recipe.effective_batch)
        batches = self._micro_batches(meter)
        try:
            return self._loop(batches, meter, log)
        except DataError as error:
            for line in dict.fromkeys([*self.deaths, *self.replaced, *getattr(error, "__notes__", ())]):
                print(line, file=sys.stderr)  # each process its own: the run's log is the main one's
            raise
        finally:
            batches.close()  # ends the loader's processes
            for number, handler in previous.items():
                signal.signal(number, handler)
            log.close()

    def _loop(self, batches: Iterator[MicroBatch], meter: Meter, log: RunLog) -> Path:
        folder, done, lr = self.checkpoint, self.first_step, 0.0
        while done < self.total_steps:
            taken, failure = self._take(batches)
            # One vote before each step, so that all processes take it or none does.
            failed, stopping = self.world.any(failure is not None, self.stop_asked_at is not None)
            if failed:
                raise failure or DataError("another process of this run could not read its data; it says why")
            if stopping:
                break
            lr = learning_rate(done, self.total_steps, self.warmup_steps, self.recipe.lr, self.recipe.min_lr)
            meter.add(self.step(taken, lr))
            log.advance()
            done += 1
            if done % self.run.log_every == 0 or done == self.total_steps:
                self._measure(done, lr, meter, log)
            if done % self.run.save_every == 0 or done == self.total_steps:
                folder = self._save(done, log)
        if done < self.total_steps:
            if meter.results:
                self._measure(done, lr, meter, log)
            if folder != checkpoint_folder(self.run.out, done):
                folder = self._save(done, log)
            log.say(f"stopped by a signal after step {done}; the same command continues from {folder}")
        log.event("end", step=done)
        if done >= self.total_steps:
            log.say(f"done: {done} steps, {folder}")
        return folder

    def _measure(self, done: int, lr: float, meter: Meter, log: RunLog) -> None:
        log.measurements(done, epoch=self._epoch(done), lr=lr, **meter.read())
        self._report_faults(done, log)

    def _take(self, batches: Iterator[MicroBatch]) -> tuple[list[MicroBatch], DataError | None]:
        """The micro-batches of a step, or why they cannot be had."""
        try:
            return [next(batches) for _ in range(self.accumulate)], None
        except DataError as error:
            return [], error

    def _micro_batches(self, meter: Meter) -> Iterator[MicroBatch]:
        source: Iterator[Batch] = iter(self.data)
        while True:
            began = time.perf_counter()
            batch = next(source)
            meter.waited += time.perf_counter() - began
            self.replaced += batch.replaced
            self.deaths += batch.notes
            yield MicroBatch(batch.images, batch.sample_ids, batch.epochs)

    def _report_faults(self, step: int, log: RunLog) -> None:
        """Name the samples that any process could not use and the workers it lost, and count the updates left out."""
        for line in self.world.gather(self.replaced):
            log.say(f"replaced a sample that cannot be used: {line}")
            log.event("replaced", step=step, sample=line)
        for line in self.world.gather(self.deaths):
            log.say(line)
            log.event("worker_died", step=step, worker=line)
        self.replaced, self.deaths = [], []
        left_out, on_end = int(self.step.left_out), int(self.step.skipped)
        if left_out > self.left_out:
            log.say(f"step {step}: {left_out - self.left_out} updates were left out, their gradients were not finite")
            log.event("left_out", step=step, updates=left_out - self.left_out)
            self.left_out = left_out
        if on_end >= MAX_SKIPPED:
            raise DivergedError(
                f"gradients were not finite for {on_end} steps on end at step {step}; no such update was applied: "
                "lower --blr, or train with --precision fp32"
            )

    def _resume(self) -> dict:
        """Load the checkpoint; return its state."""
        self.notes += [f"resumed from {self.checkpoint}", *check_resume(self.checkpoint, self.recipe)]
        return load_checkpoint(self.checkpoint, self.model, self.optimizer)

    def _save(self, step: int, log: RunLog) -> Path:
        folder = checkpoint_folder(self.run.out, step)
        if self.world.is_main:
            state = {
                "total_steps": self.total_steps,
                "data": self.data.state(step * self.recipe.effective_batch),
                "model": self.recipe.model.to_json(),
                "recipe": plain_settings(self.recipe),
                "versions": {"fastmae": fastmae.__version__, "torch": torch.__version__},
            }
            save_checkpoint(self.run.out, step, self.model, self.optimizer, state, self.run.keep)
            log.event("checkpoint", step=step, folder=folder.name)
        self.world.barrier()
        return folder

    def _describe(self) -> list[str]:
        recipe, world, config, samples = self.recipe, self.world, self.recipe.model, self.data.samples
        parameters = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        if samples is None:
            length = f"a {self.data.kind} without an index: no exact order or resume; `fastmae shards index` makes one"
        else:
            length = f"{self._epoch(self.total_steps):.2f} epochs of {samples} samples"
        return [
            f"model: {parameters / 1e6:.1f} M parameters, images {config.img_size[0]} x {config.img_size[1]}, {config.patches} "
            f"patches of {config.patch_size}, mask ratio {recipe.mask_ratio}, "
            f"target {'normalised' if config.norm_pix_loss else 'plain'} pixels",
            f"on {world.size} x {world.device.type}, {'bf16 autocast' if self.autocast else 'fp32'}, "
            f"attention {self.attention}",
            f"effective batch = {self.run.batch_size} per process x {world.size} processes x {self.accumulate} accumulated "
            f"= {recipe.effective_batch}",
            f"lr = blr {recipe.blr:g} x {recipe.effective_batch} / 256 = {recipe.lr:g}, warm-up {self.warmup_steps:.0f} steps, "
            f"half cosine to {recipe.min_lr:g}",
            f"steps = {self.total_steps}, {length}; {self.first_step} done",
            f"data: {self.data.describe()}",
        ]

    def _epoch(self, step: int) -> float:
        return step * self.recipe.effective_batch / self.data.samples if self.data.samples else 0.0

    def _on_signal(self, *_) -> None:
        now = time.monotonic()
        if self.stop_asked_at is None:
            self.stop_asked_at = now
        elif now - self.stop_asked_at > _REPEATED_SIGNAL:  # asked again after a while: the person means now
            raise KeyboardInterrupt


def _autocast(run: Run, world: World) -> torch.dtype | None:
    is_low = run.precision == "bf16" or (run.precision == "auto" and world.device.type == "cuda")
    return torch.bfloat16 if is_low else None
