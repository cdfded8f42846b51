"""Where the store of a run's rendezvous is: rank 0 hosts it, the others look for it.

torchrun has a store as well, but one and the same for every start that its ``--max-restarts`` makes: what gloo has put there
sends the processes of the next start to those that have ended (torch 2.13). So that store is only asked where rank 0's is.
"""

import contextlib
import errno
import socket
import time
import uuid
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist

from fastmae.errors import InputError
from fastmae.train.distributed.background import pauses
from fastmae.train.distributed.launcher import RankInfo

STATE = "fastmae/state"
"""The key that identifies such a store: rank 0 sets it first."""
ANSWER = timedelta(seconds=60)
"""For one request to a store that many ask at once."""
_HOST, _PORT = "fastmae/host", "fastmae/port"
_LOOPBACK = "127.0.0.1"
_ATTEMPT = 2.0  # seconds for a connection
_FIRST_KEY = 10.0  # seconds until a store must have its first key; another program's never has
_ENDS = 10.0  # seconds for a just killed rank 0, or a loader worker of it, to release its port

Note = Callable[..., None]
"""Called with what is waited for, and ``at_once`` if waiting is unlikely to help; raises to end the wait."""


def listen(info: RankInfo, note: Note) -> tuple[dist.TCPStore, str]:
    """The store that this process, rank 0, hosts from now on, and its address here, which needs no name that resolves.

    Raises InputError if the port is taken or another rank 0 is at the run's address.
    """
    launcher = _connect(info, note)[0] if info.has_agent_store else None
    port = 0 if info.has_agent_store else info.port
    _wait_until_free(port, note)
    try:
        store = dist.TCPStore(_LOOPBACK, port, is_master=True, timeout=ANSWER, wait_for_workers=False)
    except dist.DistError as error:
        raise InputError(
            f"rank 0 cannot listen at port {port} ({info.source}): {str(error).partition(', ')[0]}; is another run there? "
            "export another MASTER_PORT for all processes"
        ) from error
    name = uuid.uuid4().hex
    store.set(_HOST, name)
    store.set(STATE, "")
    if launcher is not None:
        launcher.set(_PORT, str(store.port))
    else:
        _check_address(info, name, note)
    return store, _LOOPBACK


def reach(info: RankInfo, note: Note) -> tuple[dist.TCPStore, str]:
    """The store that rank 0 hosts, and the address by which this process reaches it; looked for until it is there."""
    pause = pauses(info.size)
    launcher = _connect(info, note)[0] if info.has_agent_store else None
    while True:
        if launcher is None:
            port = info.port
        elif launcher.check([_PORT]):
            port = int(launcher.get(_PORT))
        else:
            note("torchrun's store does not know rank 0 yet")
            time.sleep(next(pause))
            continue
        if (found := _try(info.address, port, note)) is not None:
            note(f"{info.address}:{port} has a store, but no rendezvous of fastmae")
            if _is_rendezvous(found[0]):
                return found
        time.sleep(next(pause))


def _connect(info: RankInfo, note: Note) -> tuple[dist.TCPStore, str]:
    pause = pauses(info.size)
    while (found := _try(info.address, info.port, note)) is None:
        time.sleep(next(pause))
    return found


def _try(address: str, port: int, note: Note) -> tuple[dist.TCPStore, str] | None:
    """The store at that address, if it answers. Python connects first: each attempt of torch's warns in many lines."""
    try:
        with socket.create_connection((address, port), timeout=_ATTEMPT) as connection:
            number = connection.getpeername()[0]
    except socket.gaierror as error:
        note(f"{address} does not resolve on this machine ({error.strerror})", at_once=True)
        return None
    except OSError as error:
        note(f"{address}:{port} does not answer ({error.strerror or error})")
        return None
    note(f"{address}:{port} takes connections, but no store answers there")  # torch waits for that without end
    with contextlib.suppress(dist.DistError):
        return dist.TCPStore(number, port, is_master=False, timeout=ANSWER, wait_for_workers=False), number
    return None


def _wait_until_free(port: int, note: Note) -> None:
    """Wait until ``port`` is free, or some seconds have passed. Python asks, as above."""
    pause, until = pauses(1), time.monotonic() + _ENDS
    while time.monotonic() < until:
        try:
            socket.create_server(("", port)).close()
        except OSError as error:
            if error.errno != errno.EADDRINUSE:  # torch's own error names it
                return
            note(f"port {port} is still in use on this machine")
            time.sleep(next(pause))
        else:
            return


def _is_rendezvous(store: dist.TCPStore) -> bool:
    until = time.monotonic() + _FIRST_KEY
    with contextlib.suppress(dist.DistError):
        while time.monotonic() < until:
            if store.check([STATE]):
                return True
            time.sleep(0.1)
    return False


def _check_address(info: RankInfo, name: str, note: Note) -> None:
    """Whether the run's address leads the others to this process. If not, that is noted: they may know it otherwise."""
    reasons: list[str] = []
    found = _try(info.address, info.port, lambda reason, at_once=False: reasons.append(reason))
    if found is None:
        note(f"{reasons[-1]}, although rank 0 listens", at_once=True)
    elif found[0].check([_HOST]) and found[0].get(_HOST).decode() != name:
        raise InputError(
            f"rank 0 runs twice, on {socket.gethostname()} and at {info.address}:{info.port} ({info.source}); give every "
            "process a RANK of its own"
        )
