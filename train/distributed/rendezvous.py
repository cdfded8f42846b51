"""The rendezvous of a run: every process reaches the store of rank 0, and none continues before all have joined.

    arrived    each process appends a line about itself to a key of the store
    complete   rank 0 has read all of them; each process confirms that it is still there, by another line
    go         all have confirmed: a process that died while it waited is found missing here, not inside a collective

torch's own rendezvous waits in C++, handles no signal and reports nothing. Each process asks the store for one key, after a
tenth of the time that it has waited and at most twice a second: traffic grows with the number of processes, not its square.
"""

import json
import time
from collections.abc import Callable

import torch.distributed as dist

from fastmae.errors import InputError, LostProcessError
from fastmae.train.console import report
from fastmae.train.distributed.background import Background, pauses
from fastmae.train.distributed.launcher import RankInfo
from fastmae.train.distributed.peers import Peer, repeated, size_conflict
from fastmae.train.distributed.store import STATE, listen, reach

_PEERS = "fastmae/peers"
_COMPLETE, _GO = "complete", "go"
_MOST_NAMED = 16
FIRST_REPORT = 30.0
"""Seconds; each later report comes after twice the time."""
LINGER = 1.5
"""Seconds that rank 0 and its store stay for the others once it has failed."""


class Rendezvous:
    """The rendezvous of one process: the main thread reports, keeps the time and handles signals, another one waits."""

    def __init__(self, info: RankInfo, peer: Peer, timeout: float, stopped: Callable[[], str | None]):
        """``peer``: what this process publishes about itself. ``timeout``: seconds. ``stopped``: the name of the signal that
        asks this process to stop, if any."""
        self.info, self.timeout, self._stopped = info, timeout, stopped
        self.peer, self._is_main = peer, info.rank == 0
        self.address = info.address
        """By which this process reaches rank 0."""
        self._status, self._alarms = "looks for rank 0", []
        self._is_connected, self._is_late = self._is_main, False
        self._due, self._has_reported = FIRST_REPORT, False
        self._reason: str | None = None
        """Why this process gives up; the other thread publishes it."""

    def wait(self) -> tuple[dist.TCPStore, list[Peer]]:
        """The store of this start of the run, and all processes in order of their ranks.

        Raises LostProcessError, which names the ranks that are missing, after ``timeout`` or once another process has given up;
        KeyboardInterrupt after a signal; InputError if the port is taken or processes contradict each other.
        """
        self._background = Background(self._lead if self._is_main else self._follow)
        try:
            return self._background.wait(self._look)
        except dist.DistError as error:
            raise LostProcessError(f"{self._where()}: {str(error).partition(chr(10))[0]}") from error
        except BaseException as error:
            if self._reason is None and not self._background.is_over():  # raised here, by a signal's handler
                self._give_up(type(error).__name__)
            raise

    # The main thread.

    def _look(self, seconds: float) -> None:
        if name := self._stopped():
            self._give_up(f"stopped by {name}")
            raise KeyboardInterrupt(f"stopped by {name} during the rendezvous: {self._status}")
        if seconds > self.timeout:
            self._give_up("its --first-timeout is over")
            raise LostProcessError(f"{self._where()} for {seconds:.0f} s (--first-timeout): {self._status}")
        while self._alarms:
            report(f"{self._where()}: {self._alarms.pop(0)}; retries for {self.timeout:.0f} s (--first-timeout)")
        if seconds >= self._due:
            self._due = 2 * seconds
            if self._reports(seconds):
                left = self.timeout - seconds
                report(f"{self._where()} for {seconds:.0f} s: {self._status}; {left:.0f} s are left (--first-timeout)")

    def _where(self) -> str:
        info = self.info
        doing = "waits for the others" if self._is_connected else "looks for rank 0"
        return f"rank {info.rank} of {info.size} on {self.peer.host} {doing} at {info.address}:{info.port} ({info.source})"

    def _reports(self, seconds: float) -> bool:
        """Rank 0 always does; of a machine, the first process until it has reached rank 0, and once more after a minute."""
        if self._is_main or self.peer.local_rank not in (0, None):
            return self._is_main
        if self._is_connected and (self._has_reported or seconds < 2 * FIRST_REPORT):
            return False
        self._has_reported = self._is_connected
        return True

    def _give_up(self, reason: str) -> None:
        """End the other thread, which publishes the reason."""
        self._reason = f"rank {self.info.rank} on {self.peer.host} has left the rendezvous, {reason}"
        self._background.is_over(LINGER + 0.5)

    # The other thread.

    def _note(self, status: str, at_once: bool = False) -> None:
        """What is waited for; ``at_once``: report it now if it is new. Ends the wait if this process has given up."""
        if self._reason is not None:
            raise LostProcessError(self._reason)
        if at_once and status != self._status and self.peer.local_rank in (0, None):
            self._alarms.append(status)
        self._status = status

    def _lead(self) -> tuple[dist.TCPStore, list[Peer]]:
        store, self.address = listen(self.info, self._note)
        self._add(store, arrived=self.peer.to_dict())
        self._until_all(store, "arrived")
        store.set(STATE, _COMPLETE)
        self._add(store, confirmed=self.peer.to_dict())
        peers = self._until_all(store, "confirmed")
        store.set(STATE, _GO)
        return store, peers

    def _until_all(self, store: dist.TCPStore, phase: str) -> list[Peer]:
        """The processes of all ranks, once each has added a line of ``phase``."""
        pause = pauses(self.info.size)
        while True:
            lines = _read(store)
            if left := self._reason or next((line["left"] for line in lines if "left" in line), None):
                self._fail(store, lines, LostProcessError(f"{left}; the others end"))
            peers = [Peer(**line[phase]) for line in lines if phase in line]
            twice = repeated(peers)
            if wrong := size_conflict(peers, self.info.size) or (phase == "confirmed" and twice):
                self._fail(store, lines, InputError(wrong))
            found = {peer.rank: peer for peer in peers}
            missing = [rank for rank in range(self.info.size) if rank not in found]
            if not missing:
                return [found[rank] for rank in range(self.info.size)]
            self._status = _missing(missing, self.info, phase) + (f"; {twice}" if twice else "")
            if phase == "arrived":
                store.set(STATE, json.dumps({"status": self._status}))
            time.sleep(next(pause))

    def _fail(self, store: dist.TCPStore, lines: list[dict], error: InputError | LostProcessError) -> None:
        """Raise ``error`` here and, while the store is there, on all others."""
        store.set(STATE, json.dumps({type(error).__name__: str(error)}))
        if len({line["rank"] for line in lines}) > 1:
            time.sleep(LINGER)
        raise error

    def _follow(self) -> tuple[dist.TCPStore, list[Peer]]:
        while True:
            store, self.address = reach(self.info, self._note)
            self._is_connected = True
            try:
                return store, self._until_go(store)
            except dist.DistError as error:
                self._is_connected = False
                if not (self._is_late or self.info.has_agent_store):  # which may have led to the rank 0 of an earlier start
                    raise LostProcessError("rank 0 was lost before all processes had joined") from error
                self._is_late = False

    def _until_go(self, store: dist.TCPStore) -> list[Peer]:
        self._add(store, arrived=self.peer.to_dict())
        pause, has_confirmed = pauses(self.info.size), False
        while (state := store.get(STATE).decode()) != _GO or not has_confirmed:
            if state == _GO:  # with the process that had this rank before: rank 0 will miss that one, and end
                self._is_late = True
                self._note("that rank 0's run has begun without this process, which waits for the next start", at_once=True)
            elif self._reason is not None:
                self._add(store, left=self._reason)
                raise LostProcessError(self._reason)
            if state == _COMPLETE and not has_confirmed:
                self._add(store, confirmed=self.peer.to_dict())
                has_confirmed, pause = True, pauses(self.info.size)
            elif state.startswith("{"):
                status = json.loads(state)
                for kind in (InputError, LostProcessError):
                    if kind.__name__ in status:
                        raise kind(status[kind.__name__])
                self._status = status["status"]
            time.sleep(next(pause))
        found = {peer.rank: peer for peer in (Peer(**line["confirmed"]) for line in _read(store) if "confirmed" in line)}
        return [found[rank] for rank in range(self.info.size)]

    def _add(self, store: dist.TCPStore, **line) -> None:
        store.append(_PEERS, json.dumps({"rank": self.info.rank, **line}) + "\n")


def _read(store: dist.TCPStore) -> list[dict]:
    return [json.loads(line) for line in store.get(_PEERS).decode().splitlines()]


def _missing(missing: list[int], info: RankInfo, phase: str) -> str:
    """How many processes are there, and which are not."""
    more = f" and {len(missing) - _MOST_NAMED} others" if len(missing) > _MOST_NAMED else ""
    hosts = list(dict.fromkeys(info.hosts[rank] for rank in missing)) if info.hosts else []
    on = f" ({', '.join(hosts[:_MOST_NAMED])}{', ...' if len(hosts) > _MOST_NAMED else ''})" if hosts else ""
    there = "have joined" if phase == "arrived" else "still answer"
    return (
        f"{info.size - len(missing)} of {info.size} processes {there}, "
        f"missing rank {', '.join(map(str, missing[:_MOST_NAMED]))}{more}{on}"
    )
