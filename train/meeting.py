"""Where the processes of a run meet: a store that the one of rank 0 keeps.

torchrun has a store as well, but one and the same for every start that its ``--max-restarts`` makes: what gloo has put there
sends the processes of the next start to those that are gone (torch 2.13). So that store is only asked where rank 0's is.
"""

import os
import time
from datetime import timedelta

import torch.distributed as dist

from fastmae.train.environment import Place

_PORT = "fastmae/port"
_A_MOMENT = timedelta(seconds=2)  # for a connection to a port that may be of an earlier start


def open_store(place: Place, timeout: timedelta) -> dist.TCPStore:
    """The store of this start of the run, for each of its processes. Raises torch's DistError if they do not meet."""
    is_main = place.rank == 0
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return dist.TCPStore(place.address, place.port, place.size, is_main, timeout)
    launcher = dist.TCPStore(place.address, place.port, is_master=False, timeout=timeout)
    if is_main:
        store = dist.TCPStore(place.address, 0, is_master=True, timeout=timeout, wait_for_workers=False)
        launcher.set(_PORT, str(store.port))
        return store
    until = time.monotonic() + timeout.total_seconds()
    while True:
        try:
            store = dist.TCPStore(place.address, int(launcher.get(_PORT)), is_master=False, timeout=_A_MOMENT)
        except dist.DistError:  # of an earlier start: this one's rank 0 has not come yet
            if time.monotonic() > until:
                raise
            time.sleep(0.2)
        else:
            store.set_timeout(timeout)
            return store
