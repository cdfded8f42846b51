"""Signs of life: each process of a run gives one every second, and the main one names those that give none.

They pass through a small store that the main process keeps, apart from the collectives, which a lost process blocks. A process
that fails by itself says so there too.
"""

import time
from datetime import timedelta

import torch.distributed as dist

from fastmae.train.world import World

_AT_FAULT = 4.0  # seconds without a sign that count once a collective has failed: somebody is gone
_PAUSE = 5.0  # seconds between two looks that tell that this process itself was stopped for a while
_ANSWER = timedelta(seconds=10)  # for one word of the store
_GONE = 3  # words on end that the store did not give
_TO_HEAR = 2.0  # seconds that the main process and its store stay for the others
_MOST_NAMED = 8


class Vitals:
    """The signs of life of one process, and what it knows of the others. In a run of one nothing is said or known."""

    def __init__(self, world: World):
        self.world = world
        self._seen: dict[int, tuple[bytes, float]] = {}
        self._looked = time.monotonic()
        self._failures = self._number = 0
        self._store: dist.TCPStore | None = None
        if world.size > 1:
            if world.is_main:
                self._store = dist.TCPStore(world.address, 0, is_master=True, timeout=_ANSWER, wait_for_workers=False)
                for key in ("lost", "failed", "stacks"):
                    self._store.set(key, "")
            port = int(world.from_main(str(self._store.port) if self._store else None))
            if self._store is None:
                self._store = dist.TCPStore(world.address, port, is_master=False, timeout=_ANSWER)
            self._say(f"sign/{world.rank}", "0")
            world.barrier()

    def give_sign(self) -> None:
        """Still here."""
        self._number += 1
        self._say(f"sign/{self.world.rank}", str(self._number))

    def take_leave(self) -> None:
        """This process ends by itself; that it gives no further sign says nothing."""
        self._say(f"left/{self.world.rank}", "1")

    def fail(self, error: BaseException) -> None:
        """This process ends by ``error``; the first one that says so is heard."""
        reason = str(error).partition("\n")[0]
        if self._store is not None and not self.failed():
            self._say("failed", f"rank {self.world.rank} has failed, {type(error).__name__}: {reason}")
        self.take_leave()
        if self._store is not None and self.world.is_main:
            time.sleep(_TO_HEAR)

    def failed(self) -> str | None:
        """Which process has failed, and how, if one has said so."""
        return self._hear("failed") or None

    def ask_for_stacks(self) -> None:
        """Have every process write its stacks."""
        self._say("stacks", f"rank {self.world.rank}")

    def who_asks_for_stacks(self) -> str | None:
        """The process that wants the stacks of all, if one does."""
        return self._hear("stacks") or None

    def lost(self, patience: float) -> str | None:
        """That processes have given no sign for ``patience`` seconds, in words, as the main one has found; or None."""
        if self._store is None:
            return None
        if self.world.is_main:
            self._look(patience)
        found = self._hear("lost")
        return "rank 0 gives no sign of life" if self._failures >= _GONE else found or None

    def lost_at_fault(self) -> str | None:
        """What has become of others, once a collective has failed: look for some seconds."""
        self.take_leave()
        until = time.monotonic() + 3 * _AT_FAULT
        while self._store is not None and time.monotonic() < until:
            if found := self.failed() or self.lost(_AT_FAULT):
                return found
            time.sleep(0.5)
        return None

    def _look(self, patience: float) -> None:
        """The main process: tell all who is silent."""
        now, ranks = time.monotonic(), range(1, self.world.size)
        pause = now - self._looked if now - self._looked > _PAUSE else 0.0  # the others may have been stopped as well
        self._looked = now
        try:
            signs = self._store.multi_get([f"sign/{rank}" for rank in ranks])
            for rank, sign in zip(ranks, signs, strict=True):
                is_new = rank not in self._seen or self._seen[rank][0] != sign
                self._seen[rank] = sign, now if is_new else self._seen[rank][1] + pause
            silent = [r for r, (_, since) in self._seen.items() if now - since > patience]
            silent = [r for r in silent if not self._store.check([f"left/{r}"])]
        except RuntimeError:  # a slow store tells nothing of the others
            return
        if silent:
            more = f" and {len(silent) - _MOST_NAMED} others" if len(silent) > _MOST_NAMED else ""
            give = "give" if len(silent) > 1 else "gives"
            self._say("lost", f"rank {', '.join(map(str, silent[:_MOST_NAMED]))}{more} {give} no sign of life")

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
