"""What goes wrong in a run without ending it, collected on every rank and logged by rank 0."""

import json
from collections import deque

import torch

from fastmae.data.batch import Batch
from fastmae.errors import DivergedError, InputError
from fastmae.files import write_atomically
from fastmae.train.checkpoint.saver import MAX_FAILED, Saved
from fastmae.train.config.run import Run
from fastmae.train.distributed.world import World
from fastmae.train.pretrain.log import RunLog
from fastmae.train.step.loss_module import MicroBatch
from fastmae.train.step.step import StepResult
from fastmae.train.units import format_count


class Events:
    """Samples that cannot be used, lost workers, skipped updates, loss spikes, saves that failed."""

    def __init__(self, log: RunLog, run: Run, world: World, precision: str):
        self.log, self.run, self.world, self.precision = log, run, world, precision
        self.replaced: list[str] = []
        self.deaths: list[str] = []
        self._recent: deque[tuple[int, list[torch.Tensor]]] = deque(maxlen=run.max_skips)

    def note(self, batch: Batch) -> None:
        """Remember the replaced samples and lost workers of ``batch``."""
        self.replaced += batch.replaced
        self.deaths += batch.notes

    def remember(self, step: int, batches: list[MicroBatch]) -> None:
        """Keep the sample ids of ``step``, on the device, for the case that the run diverges."""
        self._recent.append((step, [batch.sample_ids for batch in batches]))

    def log_steps(self, step: int, results: list[StepResult]) -> None:
        """Log what happened in the steps up to ``step``, whose ``results`` are on the CPU.

        Raises DivergedError, on every rank, after too many consecutive skipped updates; their sample ids are written first.
        """
        for line in self.world.gather(self.replaced):
            self.log.line(f"replaced a sample that cannot be used: {line}")
            self.log.event("replaced", step=step, sample=line)
        for line in self.world.gather(self.deaths):
            self.log.line(line)
            self.log.event("worker_died", step=step, worker=line)
        self.replaced, self.deaths = [], []
        skipped, spiked = 0, 0
        for number, result in enumerate(results, step - len(results) + 1):
            is_spike = self._log_spike(number, result)
            skipped += int(result.skipped > 0 and not is_spike)
            spiked += int(is_spike)
        if skipped:
            self.log.line(f"step {step}: {format_count(skipped, 'update')} skipped, gradients were not finite")
            self.log.event("skipped", step=step, updates=skipped)
        if results and (count := int(results[-1].skipped)) >= self.run.max_skips:
            self.log.event("diverged", step=step, reason=f"{count} consecutive updates were skipped")
            where = self._write_samples(step)
            raise DivergedError(
                f"{count} consecutive updates were skipped up to step {step}: {self._advice(skipped, spiked)}; the samples of "
                f"these steps are in {where}"
            )

    def log_saves(self, saves: list[Saved]) -> None:
        """Log how saves ended."""
        for saved in saves:
            if saved.error is None:
                self.log.event(
                    "checkpoint", step=saved.step, folder=saved.folder.name, seconds=saved.seconds, bytes=saved.bytes
                )
            else:
                self.log.line(
                    f"step {saved.step}: no checkpoint could be written: {saved.error}; older ones are kept, and training "
                    f"continues; after {MAX_FAILED} consecutive failures it stops"
                )
                self.log.event("checkpoint_failed", step=saved.step, error=saved.error)

    def _log_spike(self, step: int, result: StepResult) -> bool:
        """Whether the update of ``step`` was skipped because its loss spiked; a spike is logged in any case."""
        loss, z = float(result.loss), float(result.spike)
        if z > self.run.spike_z:
            done = ", its update was skipped" if self.run.skip_spikes else ""
            self.log.line(f"step {step}: loss spike, {loss:.4f} is {z:.1f} robust deviations above the recent losses{done}")
            self.log.event("spike", step=step, loss=loss, z=z, skipped=self.run.skip_spikes)
        return z > self.run.spike_z and self.run.skip_spikes

    def _advice(self, not_finite: int, spiked: int) -> str:
        """Why updates were skipped, and what of the run's settings may help."""
        why, ways = [], ["a lower --blr"]
        if not_finite:
            why.append("gradients were not finite")
            ways += ["--precision fp32"] if self.precision != "fp32" else []
        if spiked:
            why.append("losses spiked")
            ways += [f"a --spike-z above {self.run.spike_z:g}", "--no-skip-spikes"]
        return f"{' or '.join(why)}; try {' or '.join(ways)}"

    def _write_samples(self, step: int) -> str:
        path = self.run.out / f"diverged-step-{step:07d}-rank-{self.world.rank}.json"
        steps = [{"step": s, "sample_ids": torch.cat(ids).tolist()} for s, ids in self._recent]
        try:
            with write_atomically(path) as file:
                file.write(json.dumps({"rank": self.world.rank, "steps": steps}).encode())
        except (OSError, InputError) as error:  # of this rank alone: all must end in the same way
            return f"no file, {error}"
        return str(path)
