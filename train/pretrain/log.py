"""The log of a run: a progress bar or lines on the console, ``metrics.jsonl``, TensorBoard events, and Weights & Biases."""

import contextlib
import io
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import numpy as np
from PIL import Image
from tqdm import tqdm

from fastmae.errors import InputError
from fastmae.files import write_atomically
from fastmae.optional import require
from fastmae.train import console

DRAWINGS = "reconstructions"
METRICS = "metrics.jsonl"
METRICS_SCHEMA = 1  # of ``METRICS``; each start states it


class RunLog:
    """The log of one run, written by rank 0; on other ranks every call does nothing."""

    def __init__(self, out: Path, *, is_main: bool, first_step: int, total_steps: int, wandb: str | None = None):
        """``wandb``: a project. Raises InputError, on every rank, if its package is missing; without TensorBoard's the log
        continues, and says so."""
        self.is_main, self.out = is_main, out
        self._has_failed = False
        self._lost: set[str] = set()
        package = require("wandb", "--wandb") if wandb is not None else None
        if not is_main:
            return
        self.total_steps = total_steps
        self._wandb = None
        if wandb is not None:
            self._wandb = package.init(project=wandb, dir=str(out), name=out.name, id=_run_id(out), resume="allow")
        self._jsonl = _open_for_lines(out / METRICS)
        self._events = _open_tensorboard(out / "tensorboard", first_step)
        # A terminal gets a bar; a file or a cluster's log gets a line per interval.
        self._bar = tqdm(
            total=total_steps, initial=first_step, unit="step", dynamic_ncols=True, disable=not sys.stderr.isatty()
        )

    def line(self, text: str) -> None:
        """One line for people."""
        if self.is_main:
            tqdm.write(text)
            sys.stdout.flush()

    def event(self, name: str, **fields) -> None:
        """One line of ``metrics.jsonl`` that is no measurement: start, checkpoint, skipped samples, end."""
        if self.is_main:
            schema = {"schema": METRICS_SCHEMA} if name == "start" else {}
            self._write({"event": name, "time": time.time(), **schema, **fields})

    def advance(self) -> None:
        """A step is done."""
        if self.is_main:
            self._bar.update(1)

    def picture(self, step: int, strip: Image.Image) -> None:
        """What the model reconstructs after ``step`` steps: a PNG in ``DRAWINGS``, and in TensorBoard."""
        if not self.is_main:
            return
        path = self.out / DRAWINGS / f"step-{step:07d}.png"
        with self._tolerantly():
            path.parent.mkdir(exist_ok=True)
            with write_atomically(path) as file:
                strip.save(file, "PNG")
            self.event("reconstruction", step=step, file=f"{DRAWINGS}/{path.name}")
            if self._events is not None:
                self._events.add_image("reconstruction", np.asarray(strip), step, dataformats="HWC")
        if self._wandb is not None:
            self._wandb.log({"reconstruction": require("wandb", "--wandb").Image(strip)}, step=step)

    @contextlib.contextmanager
    def _tolerantly(self) -> Iterator[None]:
        """A log that cannot be written, as on a full disk, is reported once, and does not end the run."""
        try:
            yield
        except OSError as error:
            if not self._has_failed:
                self._has_failed = True
                print(f"{self.out}: the log cannot be written, {error.strerror}; training continues without", file=sys.stderr)

    def measurements(self, step: int, **values: float | None) -> None:
        """The values of a log interval that ended with ``step`` steps done (``Meter.read``)."""
        if not self.is_main:
            return
        self._note_console()
        self._write({"step": step, "time": time.time(), **values})
        known = {f"train/{name}": value for name, value in values.items() if value is not None}
        with self._tolerantly():
            for name, value in known.items() if self._events is not None else ():
                self._events.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(known, step=step)
        is_first = "first_step_seconds" in values
        if is_first:
            speed, eta = f"took {values['first_step_seconds']:.1f} s", ""
        else:
            mfu = "" if values["mfu"] is None else f"MFU {values['mfu']:.1%}  "
            speed = f"{values['images_per_second']:.1f} img/s  {mfu}data wait {values['data_wait']:.1%}"
            eta = f"  ETA {tqdm.format_interval((self.total_steps - step) * values['seconds_per_step'])}"
        text = f"loss {values['loss']:.4f}  lr {values['lr']:.2e}  {speed}  {values['memory_bytes'] / 2**30:.1f} GiB"
        if is_first or self._bar.disable:
            self.line(f"step {step}/{self.total_steps}  epoch {values['epoch']:.2f}  {text}{eta}")
        else:
            self._bar.set_postfix_str(text)

    def close(self) -> None:
        """Flush and close everything."""
        if self.is_main:
            self._bar.close()
            self._note_console()
            with self._tolerantly():
                if self._events is not None:
                    self._events.close()
                self._jsonl.close()
            if self._wandb is not None:
                self._wandb.finish()

    def _note_console(self) -> None:
        """An event, once, for each stream that could not be written."""
        for stream, reason in console.lost().items():
            if stream not in self._lost:
                self._lost.add(stream)
                self.event("console_lost", stream=stream, reason=reason)

    def _write(self, record: dict) -> None:
        # NaN is no JSON: a loss that is none is written as null.
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        with self._tolerantly():
            self._jsonl.write(json.dumps(finite, allow_nan=False) + "\n")
            self._jsonl.flush()


def _open_tensorboard(folder: Path, first_step: int):
    """TensorBoard's writer into ``folder``, or None where its package is missing, which is reported."""
    try:
        events = require("torch.utils.tensorboard", "TensorBoard's log", "tensorboard")  # slow to import
    except InputError as error:
        print(f"{error}; training continues, with metrics.jsonl", file=sys.stderr)
        return None
    try:
        str(folder).encode()
    except UnicodeEncodeError:
        print(f"{folder}: is no UTF-8, as TensorBoard's log must be; training continues, with metrics.jsonl", file=sys.stderr)
        return None
    return events.SummaryWriter(str(folder), purge_step=first_step or None)


def _open_for_lines(path: Path) -> TextIO:
    """``path``, opened to append; what a kill left of a last line gets a line of its own."""
    file = path.open("a+b")
    if file.tell() and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n":
        file.write(b"\n")
    return io.TextIOWrapper(file, encoding="utf-8")


def _run_id(out: Path) -> str:
    """The same for every start of the run in ``out``, so that its curves continue."""
    return require("xxhash", "--wandb").xxh3_64_hexdigest(os.fsencode(out.resolve()))
