"""Signs of life: each process of a run gives one every second, and the main one names those that give none.

They pass through a small store that the main process keeps, apart from the collectives, which a lost process blocks.
"""

import time
from datetime import timedelta

import torch.distributed as dist

from fastmae.train.world import World

_AT_FAULT = 4.0  # seconds without a sign that count once a collective has failed: somebody is gone
_ANSWER = timedelta(seconds=10)  # for one word of the store
_GONE = 3  # words on end that the store did not give


class Vitals:
    """The signs of life of one process, and what it knows of the others. In a run of one nothing is said or known."""

    def __init__(self, world: World):
        self.world = world
        self._seen: dict[int, tuple[bytes, float]] = {}
        self._failures = self._number = 0
        self._store: dist.TCPStore | None = None
        if world.size > 1:
            if world.is_main:
                self._store = dist.TCPStore(world.address, 0, is_master=True, timeout=_ANSWER, wait_for_workers=False)
            port = int(world.from_main(str(self._store.port) if self._store else None))
            if self._store is None:
                self._store = dist.TCPStore(world.address, port, is_master=False, timeout=_ANSWER)
            self._say(f"sign/{world.rank}", "0")
            if world.is_main:
                self._say("lost", "")
                self._say("stacks", "")
            world.barrier()

    def give_sign(self) -> None:
        """Still here."""
        self._number += 1
        self._say(f"sign/{self.world.rank}", str(self._number))

    def take_leave(self) -> None:
        """This process ends by itself; that it gives no further sign says nothing."""
        self._say(f"left/{self.world.rank}", "1")

    def ask_for_stacks(self) -> None:
        """Have every process write its stacks."""
        self._say("stacks", f"rank {self.world.rank}")

    def who_asks_for_stacks(self) -> str | None:
        """The process that wants the stacks of all, if one does."""
        return self._hear("stacks") or None

    def lost(self, patience: float) -> str | None:
        """The processes that have given no sign for ``patience`` seconds, in words, as the main one has found; or None."""
        if self._store is None:
            return None
        if not self.world.is_main:
            found = self._hear("lost")
            return "rank 0" if self._failures >= _GONE else found or None
        now = time.monotonic()
        ranks = range(1, self.world.size)
        for rank, sign in zip(ranks, self._store.multi_get([f"sign/{rank}" for rank in ranks]), strict=True):
            if rank not in self._seen or self._seen[rank][0] != sign:
                self._seen[rank] = sign, now
        silent = [r for r, (_, since) in self._seen.items() if now - since > patience and not self._store.check([f"left/{r}"])]
        if not silent:
            return None
        text = " and ".join(f"rank {r}" for r in silent[:8]) + (f" and {len(silent) - 8} others" if len(silent) > 8 else "")
        self._say("lost", text)
        return text

    def lost_at_fault(self) -> str | None:
        """The same once a collective has failed: look for some seconds."""
        self.take_leave()
        until = time.monotonic() + 3 * _AT_FAULT
        while self._store is not None and time.monotonic() < until:
            if found := self.lost(_AT_FAULT):
                return found
            time.sleep(0.5)
        return None

    def _say(self, key: str, word: str) -> None:
        if self._store is not None:
            try:
                self._store.set(key, word)
            except RuntimeError:  # the main process and its store are gone: told by ``lost``
                self._failures += 1

    def _hear(self, key: str) -> str:
        if self._store is None:
            return ""
        try:
            word = self._store.get(key).decode()
        except RuntimeError:
            self._failures += 1
            return ""
        self._failures = 0
        return word
