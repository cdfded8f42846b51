"""Pretrain: shards in, checkpoints out, stopped and resumed at any step with the same bits."""

import signal
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import fastmae
from fastmae.config import ModelConfig
from fastmae.data.batch import Batch, LoaderConfig
from fastmae.data.loader import Loader
from fastmae.errors import DivergedError, InputError
from fastmae.files import make_folder
from fastmae.mae import MAE
from fastmae.train.checkpoint import find_checkpoint, load_checkpoint, read_state, save_checkpoint, verify
from fastmae.train.log import RunLog
from fastmae.train.optimizer import learning_rate, make_optimizer
from fastmae.train.parallel import World, join_world, leave_world, share_gradients
from fastmae.train.recipes import Recipe
from fastmae.train.step import LossModule, MicroBatch, Step

MAX_SKIPPED = 20  # updates left out on end before a run is called diverged


@dataclass(frozen=True, kw_only=True)
class Run:
    """Where a run reads and writes, and how fast it goes; none of it changes the result."""

    data: str
    """A folder of shards, or paths or URLs of tars with {000..999} in them."""
    out: Path
    """Folder of checkpoints and logs; a run that is there already is continued."""
    batch_size: int = 64
    """Images per process and micro-batch."""
    workers: int = 2
    """Loader processes per training process; 0 loads in the training process."""
    device: str = "auto"
    """auto, cpu or cuda."""
    precision: str = "auto"
    """bf16 (autocast, fp32 weights and residual stream), fp32, or auto: bf16 on GPUs, fp32 on the CPU."""
    compile: bool = False
    """Run forward and backward through torch.compile."""
    resume: str = "auto"
    """auto: the newest complete checkpoint in ``out``, if any; or the path of one."""
    log_every: int = 20
    """Steps between two measurements."""
    save_every: int = 500
    """Steps between two checkpoints; the last step always makes one."""
    keep: int = 3
    """Newest checkpoints to keep."""

    def __post_init__(self):
        for name in ("batch_size", "log_every", "save_every", "keep"):
            if getattr(self, name) < 1:
                raise InputError(f"{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")
        if self.precision not in ("auto", "bf16", "fp32"):
            raise InputError(f"precision must be auto, bf16 or fp32, got {self.precision!r}")


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
        torch.manual_seed(recipe.seed)
        self.model = MAE(recipe.model).to(world.device)
        self.optimizer = make_optimizer(self.model, recipe.weight_decay, recipe.betas)
        self.first_step, self.notes = self._resume()
        self.data = self._open_data()
        self.total_steps = recipe.total_steps(self.data.samples)
        self.warmup_steps = self.total_steps * recipe.warmup_epochs / recipe.epochs
        # DDP takes its first weights from rank 0, so it wraps a model that is loaded already.
        module = LossModule(self.model)
        module = share_gradients(torch.compile(module) if run.compile else module, world)
        self.step = Step(
            module,
            self.optimizer,
            patches=recipe.model.patches,
            mask_ratio=recipe.mask_ratio,
            seed=recipe.seed,
            autocast=self._autocast(),
        )
        self.stop_asked = False

    def train(self) -> Path:
        """The loop. Returns the newest checkpoint."""
        log = RunLog(self.run.out, is_main=self.world.is_main, first_step=self.first_step, total_steps=self.total_steps)
        for line in self.notes + self._describe():
            log.say(line)
        log.event(
            "start", step=self.first_step, recipe=asdict(self.recipe), run=_plain(asdict(self.run)), world=self.world.size
        )
        previous = {s: signal.signal(s, self._on_signal) for s in (signal.SIGTERM, signal.SIGINT)}
        meter = Meter(self.world, self.recipe.effective_batch)
        batches = self._micro_batches(log, meter)
        try:
            return self._loop(batches, meter, log)
        finally:
            batches.close()  # ends the loader's processes
            for number, handler in previous.items():
                signal.signal(number, handler)
            log.close()

    def _loop(self, batches: Iterator[MicroBatch], meter: "Meter", log: RunLog) -> Path:
        folder = find_checkpoint(self.run.out)[0] if self.first_step else None
        saved = self.first_step
        for step in range(self.first_step, self.total_steps):
            lr = self._lr(step)
            result = self.step([next(batches) for _ in range(self.accumulate)], lr)
            meter.add(result)
            log.advance()
            done = step + 1
            is_last = done == self.total_steps
            at_interval = done % self.run.log_every == 0 or is_last
            # Asking the other processes costs a wait, so a run of several does it at intervals only.
            stopping = self.world.any(self.stop_asked) if at_interval or self.world.size == 1 else False
            if at_interval or stopping:
                log.measurements(done, epoch=self._epoch(done), lr=lr, **meter.read())
                self._check_finite(done, log)
            if done % self.run.save_every == 0 or is_last or stopping:
                folder, saved = self._save(done, log), done
            if stopping:
                log.say(f"stopped by a signal after step {done}; the same command continues from {folder}")
                break
        log.event("end", step=saved)
        if folder is None:
            raise InputError(f"nothing to do: the run has {self.total_steps} steps")
        if saved == self.total_steps:
            log.say(f"done: {saved} steps, {folder}")
        return folder

    def _micro_batches(self, log: RunLog, meter: "Meter") -> Iterator[MicroBatch]:
        source: Iterator[Batch] = iter(self.data)
        device = self.world.device
        while True:
            began = time.perf_counter()
            batch = next(source)
            meter.waited += time.perf_counter() - began
            for line in batch.replaced:
                log.say(f"replaced a sample that cannot be used: {line}")
                log.event("replaced", sample=line)
            yield MicroBatch(*(t.to(device, non_blocking=True) for t in (batch.images, batch.sample_ids, batch.epochs)))

    def _resume(self) -> tuple[int, list[str]]:
        """Load the checkpoint to continue from: the step it stands at, and what to say about it."""
        if self.run.resume == "auto":
            folder, damaged = find_checkpoint(self.run.out)
        else:
            folder, damaged = Path(self.run.resume), []
            verify(folder)
        notes = [f"ignored a damaged checkpoint: {line}" for line in damaged]
        self.state = {}
        if folder is None:
            return 0, notes
        state = read_state(folder)
        theirs, ours = ModelConfig.from_json(state["model"]), self.recipe.model
        changed = [f for f in asdict(ours) if getattr(ours, f) != getattr(theirs, f) and f != "attention"]
        if changed:
            raise InputError(
                f"{folder}: a checkpoint of another architecture, "
                + ", ".join(f"{f} {getattr(theirs, f)} there and {getattr(ours, f)} here" for f in changed)
                + "; give its settings or another --out"
            )
        for name in ("seed", "effective_batch"):
            if state[name] != getattr(self.recipe, name):
                raise InputError(f"{folder}: was trained with {name} {state[name]}, not {getattr(self.recipe, name)}; "
                                 "give that value or another --out")  # fmt: skip
        self.state = load_checkpoint(folder, self.model, self.optimizer)
        return self.state["step"], [*notes, f"resumed from {folder}"]

    def _open_data(self) -> Loader:
        recipe, world = self.recipe, self.world
        config = LoaderConfig(
            image_size=recipe.model.img_size,
            channels=recipe.model.in_chans,
            augment=recipe.augment,
            seed=recipe.seed,
            workers=self.run.workers,
            pin_memory=world.device.type == "cuda",
        )
        data = Loader(
            self.run.data,
            config,
            batch_size=self.run.batch_size,
            rank=world.rank,
            world_size=world.size,
            start=self.first_step * recipe.effective_batch,
        )
        if self.state and self.state["data"] != data.fingerprint:
            raise InputError(
                f"{self.run.data}: other data than this run began with, fingerprint {data.fingerprint} here and "
                f"{self.state['data']} in the checkpoint; give that data or another --out"
            )
        return data

    def _save(self, step: int, log: RunLog) -> Path:
        folder = self.run.out / f"step-{step:07d}"
        if self.world.is_main:
            state = {
                "samples": step * self.recipe.effective_batch,
                "epoch": self._epoch(step),
                "total_steps": self.total_steps,
                "seed": self.recipe.seed,
                "effective_batch": self.recipe.effective_batch,
                "mask_ratio": self.recipe.mask_ratio,
                "data": self.data.fingerprint,
                "model": self.recipe.model.to_json(),
                "versions": {"fastmae": fastmae.__version__, "torch": torch.__version__},
            }
            save_checkpoint(self.run.out, step, self.model, self.optimizer, state, self.run.keep)
            log.event("checkpoint", step=step, folder=folder.name)
        self.world.barrier()
        return folder

    def _check_finite(self, step: int, log: RunLog) -> None:
        skipped = int(self.step.skipped)
        if skipped:
            log.say(f"step {step}: the last {skipped} updates were left out, their gradients were not finite")
            log.event("skipped", step=step, updates=skipped)
        if skipped >= MAX_SKIPPED:
            raise DivergedError(
                f"gradients were not finite for {skipped} steps on end at step {step}; no such update was applied: "
                "lower --blr, or train with --precision fp32"
            )

    def _describe(self) -> list[str]:
        recipe, run, world, config = self.recipe, self.run, self.world, self.recipe.model
        parameters = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        samples = self.data.samples
        epochs = (
            f" = {self._epoch(self.total_steps):.2f} epochs of {samples} samples"
            if samples
            else f" of a {self.data.fingerprint}"
        )
        return [
            f"model: {parameters / 1e6:.1f} M parameters, images {config.img_size[0]} x {config.img_size[1]}, {config.patches} "
            f"patches of {config.patch_size}, mask ratio {recipe.mask_ratio}, "
            f"target {'normalised' if config.norm_pix_loss else 'plain'} pixels",
            f"on {world.size} x {world.device.type}, {'bf16 autocast' if self._autocast() else 'fp32'}",
            f"effective batch = {run.batch_size} per process x {world.size} processes x {self.accumulate} accumulated "
            f"= {recipe.effective_batch}",
            f"lr = blr {recipe.blr:g} x {recipe.effective_batch} / 256 = {recipe.lr:g}, warm-up {self.warmup_steps:.0f} steps, "
            f"half cosine to {recipe.min_lr:g}",
            f"steps = {self.total_steps}{epochs}; {self.first_step} done",
        ]

    def _lr(self, step: int) -> float:
        return learning_rate(step, self.total_steps, self.warmup_steps, self.recipe.lr, self.recipe.min_lr)

    def _epoch(self, step: int) -> float:
        return step * self.recipe.effective_batch / self.data.samples if self.data.samples else 0.0

    def _autocast(self) -> torch.dtype | None:
        is_low = self.run.precision == "bf16" or (self.run.precision == "auto" and self.world.device.type == "cuda")
        return torch.bfloat16 if is_low else None

    def _on_signal(self, *_) -> None:
        if self.stop_asked:  # asked twice: the person means now
            raise KeyboardInterrupt
        self.stop_asked = True


class Meter:
    """Loss and speed since the last reading. Losses stay on the device until they are read."""

    def __init__(self, world: World, effective_batch: int):
        self.world, self.effective_batch = world, effective_batch
        self._clear()

    def _clear(self) -> None:
        self.results = []
        self.waited = 0.0
        self.began = time.perf_counter()

    def add(self, result) -> None:
        """Count one step."""
        self.results.append(result)

    def read(self) -> dict[str, float]:
        """Means since the last reading, which waits for the device, over all processes for the loss."""
        steps = len(self.results)
        # Of steps that were left out the loss says nothing; if all were, it is NaN, as it should be.
        loss = torch.stack([r.loss for r in self.results]).nanmean()
        values = {"loss": self.world.mean(loss).item(), "grad_norm": self.results[-1].grad_norm.item()}
        seconds = time.perf_counter() - self.began
        values |= {
            "images_per_second": steps * self.effective_batch / seconds,
            "seconds_per_step": seconds / steps,
            "data_wait": self.waited / seconds,
        }
        self._clear()
        return values


def accumulation(effective_batch: int, batch_size: int, processes: int) -> int:
    """Micro-batches per step. Raises InputError unless they make up the effective batch exactly."""
    count, rest = divmod(effective_batch, batch_size * processes)
    if rest or not count:
        raise InputError(
            f"effective batch {effective_batch} must be a multiple of {batch_size} per process x {processes} processes = "
            f"{batch_size * processes}; change --batch-size or --effective-batch"
        )
    return count


def _plain(fields: dict) -> dict:
    return {k: str(v) if isinstance(v, Path) else v for k, v in fields.items()}
