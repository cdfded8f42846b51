"""What a run tells: a progress bar or lines on the console, ``metrics.jsonl``, and TensorBoard events."""

import json
import math
import sys
import time
from pathlib import Path

from tqdm import tqdm

from fastmae.optional import require


class RunLog:
    """The log of one run, kept by its main process; on other processes every call does nothing."""

    def __init__(self, out: Path, *, is_main: bool, first_step: int, total_steps: int):
        self.is_main = is_main
        if not is_main:
            return
        events = require("torch.utils.tensorboard", "the log", "tensorboard")  # slow to import
        self.total_steps = total_steps
        self._jsonl = (out / "metrics.jsonl").open("a", encoding="utf-8")
        self._events = events.SummaryWriter(str(out / "tensorboard"), purge_step=first_step or None)
        # A terminal gets a bar; a file or a cluster's log gets a line per interval.
        self._bar = tqdm(
            total=total_steps, initial=first_step, unit="step", dynamic_ncols=True, disable=not sys.stderr.isatty()
        )

    def say(self, text: str) -> None:
        """One line for people."""
        if self.is_main:
            tqdm.write(text)
            sys.stdout.flush()

    def event(self, name: str, **fields) -> None:
        """One line of ``metrics.jsonl`` that is no measurement: start, checkpoint, skipped samples, end."""
        if self.is_main:
            self._write({"event": name, "time": time.time(), **fields})

    def advance(self) -> None:
        """A step is done."""
        if self.is_main:
            self._bar.update(1)

    def measurements(self, step: int, **values: float) -> None:
        """The values of a log interval that ended with ``step`` steps done."""
        if not self.is_main:
            return
        self._write({"step": step, "time": time.time(), **values})
        for name, value in values.items():
            self._events.add_scalar(f"train/{name}", value, step)
        text = (
            f"loss {values['loss']:.4f}  lr {values['lr']:.2e}  {values['images_per_second']:.1f} img/s  "
            f"data wait {values['data_wait']:.1%}"
        )
        if self._bar.disable:
            left = (self.total_steps - step) * values["seconds_per_step"]
            self.say(f"step {step}/{self.total_steps}  epoch {values['epoch']:.2f}  {text}  ETA {tqdm.format_interval(left)}")
        else:
            self._bar.set_postfix_str(text)

    def close(self) -> None:
        """Flush and close everything."""
        if self.is_main:
            self._bar.close()
            self._events.close()
            self._jsonl.close()

    def _write(self, record: dict) -> None:
        # NaN is no JSON: a loss that is none is written as null.
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        self._jsonl.write(json.dumps(finite, allow_nan=False) + "\n")
        self._jsonl.flush()
