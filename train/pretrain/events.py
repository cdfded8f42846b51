"""What goes wrong in a run without ending it, collected on every process and told by the main one."""

import json
from collections import deque
from pathlib import Path

import torch

from fastmae.data.batch import Batch
from fastmae.errors import DivergedError, InputError
from fastmae.files import write_atomically
from fastmae.train.checkpoint.saver import MAX_FAILED, Saved
from fastmae.train.distributed.world import World
from fastmae.train.pretrain.log import RunLog
from fastmae.train.step.spikes import SpikeDetector
from fastmae.train.step.step import MicroBatch, StepResult


class Incidents:
    """Samples that cannot be used, lost workers, updates left out, loss spikes, saves that failed."""

    def __init__(self, log: RunLog, world: World, out: Path, detector: SpikeDetector, *, skips_spikes: bool, max_skips: int,
                 precision: str):  # fmt: skip
        self.log, self.world, self.out, self.detector = log, world, out, detector
        self.skips_spikes, self.max_skips, self.precision = skips_spikes, max_skips, precision
        self.replaced: list[str] = []
        self.deaths: list[str] = []
        self._recent: deque[tuple[int, list[torch.Tensor]]] = deque(maxlen=max_skips)

    def note(self, batch: Batch) -> None:
        """Remember what the loader says of ``batch``."""
        self.replaced += batch.replaced
        self.deaths += batch.notes

    def remember(self, step: int, batches: list[MicroBatch]) -> None:
        """Keep the sample ids of ``step``, on the device, in case that the run diverges."""
        self._recent.append((step, [batch.sample_ids for batch in batches]))

    def tell(self, step: int, results: list[StepResult]) -> None:
        """Tell what happened in the steps up to ``step``, whose ``results`` are on the CPU.

        Raises DivergedError, on every process, if too many updates on end were left out; their sample ids are written first.
        """
        for line in self.world.gather(self.replaced):
            self.log.say(f"replaced a sample that cannot be used: {line}")
            self.log.event("replaced", step=step, sample=line)
        for line in self.world.gather(self.deaths):
            self.log.say(line)
            self.log.event("worker_died", step=step, worker=line)
        self.replaced, self.deaths = [], []
        left_out, spiked = 0, 0
        for number, result in enumerate(results, step - len(results) + 1):
            is_spike = self._tell_spike(number, result)
            left_out += int(result.skipped > 0 and not is_spike)
            spiked += int(is_spike)
        if left_out:
            self.log.say(f"step {step}: {left_out} updates were left out, their gradients were not finite")
            self.log.event("left_out", step=step, updates=left_out)
        if results and (on_end := int(results[-1].skipped)) >= self.max_skips:
            reason = f"{on_end} updates on end were left out"
            self.log.event("diverged", step=step, reason=reason)
            where = self._write_samples(step)
            raise DivergedError(
                f"{on_end} consecutive updates were skipped up to step {step}: {self._advice(left_out, spiked)}; the samples "
                f"of these steps are in {where}"
            )

    def tell_saves(self, saves: list[Saved]) -> None:
        """Tell how saves ended."""
        for saved in saves:
            if saved.error is None:
                self.log.event(
                    "checkpoint", step=saved.step, folder=saved.folder.name, seconds=saved.seconds, bytes=saved.bytes
                )
            else:
                self.log.say(
                    f"step {saved.step}: no checkpoint could be written: {saved.error}; older ones are as they were, and "
                    f"training goes on; after {MAX_FAILED} such on end it stops"
                )
                self.log.event("checkpoint_failed", step=saved.step, error=saved.error)

    def _tell_spike(self, step: int, result: StepResult) -> bool:
        """Whether the loss of ``step`` was a spike; if so, tell."""
        # Where the step itself skips them it has scored them already, on the device.
        z = float(result.spike if self.skips_spikes else self.detector.score(result.loss.to(self.detector.losses.device)))
        if z > self.detector.threshold:
            loss = float(result.loss)
            done = ", its update was left out" if self.skips_spikes else ""
            self.log.say(f"step {step}: loss spike, {loss:.4f} is {z:.1f} robust deviations above the recent losses{done}")
            self.log.event("spike", step=step, loss=loss, z=z, skipped=self.skips_spikes)
        return z > self.detector.threshold and self.skips_spikes

    def _advice(self, not_finite: int, spiked: int) -> str:
        """Why updates were skipped, and what of the run's settings may help."""
        why, ways = [], ["a lower --blr"]
        if not_finite:
            why.append("gradients were not finite")
            ways += ["--precision fp32"] if self.precision != "fp32" else []
        if spiked:
            why.append("losses spiked")
            ways += [f"a --spike-z above {self.detector.threshold:g}", "--no-skip-spikes"]
        return f"{' or '.join(why)}; try {' or '.join(ways)}"

    def _write_samples(self, step: int) -> str:
        path = self.out / f"diverged-step-{step:07d}-rank-{self.world.rank}.json"
        steps = [{"step": s, "sample_ids": torch.cat(ids).tolist()} for s, ids in self._recent]
        try:
            with write_atomically(path) as file:
                file.write(json.dumps({"rank": self.world.rank, "steps": steps}).encode())
        except (OSError, InputError) as error:  # of this process alone: all must end in the same way
            return f"no file, {error}"
        return str(path)
