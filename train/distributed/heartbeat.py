"""Signs of life: each process of a run gives one every second, and the main one names those that give none.

They pass through a small store that the main process keeps, apart from the collectives, which a lost process blocks. A process
that fails by itself says so there too. A thread of its own speaks with the store: whoever asks it while the main process is
stopped waits for ever. Time in which this process was suspended is no silence of the others: they may all have been.
"""

import threading
import time
from datetime import timedelta

import torch.distributed as dist

from fastmae.clock import RunClock
from fastmae.train.distributed.world import World

_TICK = 1.0  # seconds between two signs
_AT_FAULT = 4.0  # seconds without a sign that count once a collective has failed: somebody is gone
_ANSWER = timedelta(seconds=10)  # for one word of the store
_GONE = 3  # refusals on end after which there is no store any more
_TO_HEAR = 2.0  # seconds that the main process and its store stay for the others
_MOST_NAMED = 8
_LEFT = "left"
_WORDS = ("lost", "failed", "stacks")


class Vitals:
    """The signs of life of one process, and what it knows of the others. In a run of one nothing is said or known."""

    def __init__(self, world: World):
        self.world = world
        self._to_say: dict[str, str] = {}
        self._heard = dict.fromkeys(_WORDS, "")
        self._clock, self._heard_at = RunClock(), 0.0
        self._signs: dict[int, tuple[bytes, float]] = {}
        """Of each other process, on the main one: its last sign, and since when."""
        self._refusals = 0
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        if world.size > 1:
            self._store = self._open()
            self._thread = threading.Thread(target=self._run, name="vitals", daemon=True)
            self._thread.start()

    def end(self) -> None:
        """This process ends by itself; that it gives no further sign says nothing."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join(timeout=3 * _TICK)

    def fail(self, error: BaseException) -> None:
        """This process ends by ``error``; the first one that says so is heard."""
        if self._thread is None:
            return
        if not self.failed():
            reason = str(error).partition("\n")[0].encode(errors="backslashreplace").decode()  # names may be no UTF-8
            self._to_say["failed"] = f"rank {self.world.rank} has failed, {type(error).__name__}: {reason}"
        self.end()
        if self.world.is_main:
            time.sleep(_TO_HEAR)

    def failed(self) -> str | None:
        """Which process has failed, and how, if one has said so."""
        return self._heard["failed"] or None

    def ask_for_stacks(self) -> None:
        """Have every process write its stacks."""
        self._to_say["stacks"] = f"rank {self.world.rank}"

    def who_asks_for_stacks(self) -> str | None:
        """The process that wants the stacks of all, if one does."""
        return self._heard["stacks"] or None

    def lost(self, patience: float) -> str | None:
        """That processes have given no sign for ``patience`` seconds, in words, as the main one has found; or None."""
        if self._thread is None:
            return None
        now = self._clock.read()
        if not self.world.is_main and (self._refusals >= _GONE or now - self._heard_at > patience):
            return "rank 0 gives no sign of life"
        silent = [r for r, (sign, since) in self._signs.items() if sign != _LEFT.encode() and now - since > patience]
        if not silent:
            return self._heard["lost"] or None
        more = f" and {len(silent) - _MOST_NAMED} others" if len(silent) > _MOST_NAMED else ""
        give = "give" if len(silent) > 1 else "gives"
        word = f"rank {', '.join(map(str, silent[:_MOST_NAMED]))}{more} {give} no sign of life"
        self._to_say["lost"] = word
        return word

    def lost_at_fault(self) -> str | None:
        """What has become of others, once a collective has failed: look for some seconds."""
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
            for word in (*_WORDS, *map(_sign_of, range(world.size))):
                store.set(word, "")
        port = int(world.from_main(str(store.port) if store else None))
        return store or dist.TCPStore(world.address, port, is_master=False, timeout=_ANSWER)

    def _run(self) -> None:
        number, mine = 0, _sign_of(self.world.rank)
        while not self._ended.wait(_TICK):
            number += 1
            self._to_say[mine] = str(number)
            self._exchange()
        self._to_say[mine] = _LEFT
        self._exchange()

    def _exchange(self) -> None:
        """Say what is to be said, and hear what the others have."""
        others = range(1, self.world.size) if self.world.is_main else ()
        try:
            while self._to_say:
                self._store.set(*self._to_say.popitem())
            heard = self._store.multi_get([*_WORDS, *map(_sign_of, others)])
        except RuntimeError:  # the main process and its store are gone: told by ``lost``
            self._refusals += 1
            return
        now, before = self._clock.read(), self._signs
        self._refusals, self._heard_at = 0, now
        self._heard = {word: said.decode() for word, said in zip(_WORDS, heard, strict=False)}
        self._signs = {
            rank: before[rank] if rank in before and before[rank][0] == sign else (sign, now)
            for rank, sign in zip(others, heard[len(_WORDS) :], strict=True)
        }


def _sign_of(rank: int) -> str:
    return f"sign/{rank}"
