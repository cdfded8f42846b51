"""Heartbeats: each process of a run sends one every second, and rank 0 names the ranks that send none.

They go through a small TCPStore that rank 0 hosts, apart from the collectives, which a lost process blocks. A process that
fails by itself publishes its error there too. A separate thread uses the store, as a request while rank 0 is stopped
waits for ever. Time in which this process was suspended does not count against the others: they may all have been.
"""

import threading
import time
from datetime import timedelta

import torch.distributed as dist

from fastmae.clock import RunClock
from fastmae.train.distributed.world import World

_TICK = 1.0  # seconds between two heartbeats
_AT_FAULT = 4.0  # seconds without a heartbeat that count once a collective has failed: a process is lost
_ANSWER = timedelta(seconds=10)  # for one request to the store
_MOST_REFUSALS = 3  # consecutive ones after which the store is lost
_LINGER = 2.0  # seconds that rank 0 and its store stay for the others once it has failed
_MOST_NAMED = 8
_ENDED = "ended"
_EVENTS = ("lost", "failed", "stacks")


class Heartbeat:
    """The heartbeat of one process, and what it knows of the others. In a run of one nothing is sent or known."""

    def __init__(self, world: World):
        self.world = world
        self._to_send: dict[str, str] = {}
        self._events = dict.fromkeys(_EVENTS, "")
        self._clock, self._answered_at = RunClock(), 0.0
        self._beats: dict[int, tuple[bytes, float]] = {}
        """Of each other rank, on rank 0: its last heartbeat, and since when."""
        self._refusals = 0
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        if world.size > 1:
            self._store = self._open()
            self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
            self._thread.start()

    def end(self) -> None:
        """This process ends normally, and does not count as lost without further heartbeats."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join(timeout=3 * _TICK)

    def fail(self, error: BaseException) -> None:
        """This process ends by ``error``; the first one that fails is published."""
        if self._thread is None:
            return
        if not self.failed():
            reason = str(error).partition("\n")[0].encode(errors="backslashreplace").decode()  # names may be no UTF-8
            self._to_send["failed"] = f"rank {self.world.rank} has failed, {type(error).__name__}: {reason}"
        self.end()
        if self.world.is_main:
            time.sleep(_LINGER)

    def failed(self) -> str | None:
        """Which rank has failed, and how; None if none has published an error."""
        return self._events["failed"] or None

    def request_stacks(self) -> None:
        """Have every process write its stacks."""
        self._to_send["stacks"] = f"rank {self.world.rank}"

    def stacks_requested_by(self) -> str | None:
        """The rank that wants the stacks of all, if one does."""
        return self._events["stacks"] or None

    def lost(self, timeout: float) -> str | None:
        """A message that names ranks without a heartbeat for ``timeout`` seconds, as rank 0 has found; or None."""
        if self._thread is None:
            return None
        now = self._clock.read()
        if not self.world.is_main and (self._refusals >= _MOST_REFUSALS or now - self._answered_at > timeout):
            return f"no heartbeat from rank 0 for {now - self._answered_at:.0f} s"
        ended = _ENDED.encode()
        silent = {r: now - since for r, (beat, since) in self._beats.items() if beat != ended and now - since > timeout}
        if not silent:
            return self._events["lost"] or None
        more = f" and {len(silent) - _MOST_NAMED} others" if len(silent) > _MOST_NAMED else ""
        ranks = ", ".join(map(str, [*silent][:_MOST_NAMED]))
        message = f"no heartbeat from rank {ranks}{more} for {min(silent.values()):.0f} s"
        self._to_send["lost"] = message
        return message

    def lost_at_fault(self) -> str | None:
        """Which rank has failed or is lost, once a collective has failed: looks for some seconds."""
        until = self._clock.read() + 3 * _AT_FAULT
        while self._thread is not None and self._clock.read() < until:
            if found := self.failed() or self.lost(_AT_FAULT):
                return found
            time.sleep(0.2)
        return None

    def _open(self) -> dist.TCPStore:
        world, store = self.world, None
        if world.is_main:
            store = dist.TCPStore(world.address, 0, is_master=True, timeout=_ANSWER, wait_for_workers=False)
            for key in (*_EVENTS, *map(_key, range(world.size))):
                store.set(key, "")
        port = int(world.from_main(str(store.port) if store else None))
        return store or dist.TCPStore(world.address, port, is_master=False, timeout=_ANSWER)

    def _run(self) -> None:
        number, key = 0, _key(self.world.rank)
        while not self._ended.wait(_TICK):
            number += 1
            self._to_send[key] = str(number)
            self._exchange()
        self._to_send[key] = _ENDED
        self._exchange()

    def _exchange(self) -> None:
        """Send what is pending, and read what the others have sent."""
        others = range(1, self.world.size) if self.world.is_main else ()
        try:
            while self._to_send:
                self._store.set(*self._to_send.popitem())
            values = self._store.multi_get([*_EVENTS, *map(_key, others)])
        except RuntimeError:  # rank 0 and its store are lost: ``lost`` reports it
            self._refusals += 1
            return
        now, before = self._clock.read(), self._beats
        self._refusals, self._answered_at = 0, now
        self._events = {event: value.decode() for event, value in zip(_EVENTS, values, strict=False)}
        self._beats = {
            rank: before[rank] if rank in before and before[rank][0] == beat else (beat, now)
            for rank, beat in zip(others, values[len(_EVENTS) :], strict=True)
        }


def _key(rank: int) -> str:
    return f"heartbeat/{rank}"
