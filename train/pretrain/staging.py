"""``--stage``: one rank of each node copies the shards to the node's own disk, and the others wait for it.

A copy may take longer than any timeout of a collective. So it is made in a thread, and all ranks look at it together every
second: each look is a heartbeat, a copy that fails or a signal ends the wait of all, and the watch counts the time without
progress on any node.
"""

import threading
import time
from pathlib import Path

from fastmae.errors import InputError
from fastmae.shards.index import JSON_NAME, Index
from fastmae.shards.stage import Copy
from fastmae.shards.staged import staged_folder
from fastmae.train.config.run import Run
from fastmae.train.distributed.signals import StopSignals
from fastmae.train.distributed.watch import Watch
from fastmae.train.distributed.world import World

_LOOK = 1.0  # seconds between two looks, once the first, shorter ones have found the copy unfinished
_LOOKS_PER_LINE = 10


def stage_data(run: Run, world: World, watch: Watch, signals: StopSignals) -> tuple[str, list[str]]:
    """Where this process reads ``run.data``: the copy under ``run.stage``, once it is complete on all nodes; and a line
    about it for the log.

    After a signal it is the original, which the run then hardly reads. Raises, on every rank, InputError or DataError if
    there is nothing that could be copied, or it cannot be.
    """
    if run.stage is None:
        return run.data, []
    folder = Path(world.by_main(lambda: _folder(run)))
    began = time.monotonic()
    copying = _Copying(Copy(run.data, run.stage)) if world.local_rank == 0 else None
    try:
        is_stopped = _wait(copying, world, watch, signals)
    finally:
        if copying is not None:
            copying.end()
    if is_stopped:
        return run.data, [f"the copy of {run.data} to {folder} was interrupted; the next start continues it"]
    copies = world.gather([(copying.copy.copied - copying.copy.skipped, copying.copy.total)] if copying else [])
    copied, total = (max(figures) for figures in zip(*copies, strict=True))
    how = (
        f"{copied / 1e9:.2f} of {total / 1e9:.2f} GB copied in {time.monotonic() - began:.0f} s" if copied else "copied before"
    )
    return str(folder), [f"data: staged in {folder}, {how}"]


class _Copying:
    """A ``Copy`` in a thread of its own."""

    def __init__(self, copy: Copy):
        self.copy = copy
        self.error: Exception | None = None
        self._seen = -1
        self._thread = threading.Thread(target=self._run, name="staging", daemon=True)
        self._thread.start()

    def is_busy(self) -> bool:
        """Whether it is still running."""
        return self._thread.is_alive()

    def has_moved(self) -> bool:
        """Whether there was progress since this was asked last; waiting for another process that copies counts as such."""
        self._seen, before = self.copy.copied, self._seen
        return self._seen != before or self.copy.waits_for is not None

    def figures(self) -> tuple[int, int, str | None]:
        """Bytes copied, bytes in all, and the process that is waited for."""
        return self.copy.copied, self.copy.total, self.copy.waits_for

    def end(self) -> None:
        """Stop it, if it is running."""
        self.copy.stop()
        self._thread.join()

    def _run(self) -> None:
        try:
            self.copy.run()
        except Exception as error:  # raised in the main thread
            self.error = error


def _folder(run: Run) -> str:
    if not (Path(run.data) / JSON_NAME).is_file():
        raise InputError(
            f"--stage copies a folder of indexed shards, and {run.data} has no {JSON_NAME}: `fastmae shards index` makes one "
            "for local tars; streams are read where they are, without --stage"
        )
    return str(staged_folder(run.stage, Index.load(run.data)))


def _wait(copying: _Copying | None, world: World, watch: Watch, signals: StopSignals) -> bool:
    """Until no rank copies any more; whether a signal ended it. Raises what a copy has raised, on every rank."""
    line = _Line(world)
    look = 0
    while True:
        look += 1
        time.sleep(min(_LOOK, 0.01 * 2 ** min(look, 10)))
        is_busy = copying is not None and copying.is_busy()  # asked first: an error is there before the thread ends
        has_failed = copying is not None and copying.error is not None
        has_moved = copying is not None and copying.has_moved()
        busy, failed, moved, stopped = world.any(is_busy, has_failed, has_moved, signals.received is not None)
        if moved:
            watch.alive("staging shards")
        if failed:
            reasons = world.gather([str(copying.error)] if has_failed else [])
            raise copying.error if has_failed else InputError(f"{reasons[0]} (on another rank)")
        if stopped or not busy:
            return busy
        if look % _LOOKS_PER_LINE == 0:
            line.write(world.gather([copying.figures()] if copying else []))


class _Line:
    """The line about all copies together that rank 0 writes every ten seconds."""

    def __init__(self, world: World):
        self.world = world
        self._before, self._at = 0, time.monotonic()

    def write(self, copies: list[tuple[int, int, str | None]]) -> None:
        """``copies``: bytes copied, bytes in all, and the process that is waited for, of each node."""
        copied, total = (sum(figures) for figures in list(zip(*copies, strict=True))[:2])
        now = time.monotonic()
        speed = (copied - self._before) / (now - self._at)
        self._before, self._at = copied, now
        nodes = f" on {len(copies)} nodes" if len(copies) > 1 else ""
        waits = sorted({process for *_, process in copies if process})
        waiting = f", waiting for {waits[0]}, which copies the same shards" if waits else ""
        if self.world.is_main:
            print(f"staging: {copied / 1e9:.2f} of {total / 1e9:.2f} GB{nodes}, {speed / 1e9:.2f} GB/s{waiting}", flush=True)
