"""A child that tries attention backends some of which crash it, hang, break the GPU or compute something else.

Run as ``probe_process.py`` is. Backends are named for what they do; with ``torch`` as first argument they are
torch's own, of which ``flash`` crashes and ``sdpa`` is wrong.
"""

import json
import os
import signal
import sys
import time
from typing import NamedTuple

from fastmae.model.attention.probe_process import main

_is_broken = False


class Verdict(NamedTuple):
    reason: str | None
    lasts: bool = True


def try_out(backend, device, dtype, shape):
    global _is_broken
    print(f"a library talks of {backend}", end="", flush=True)  # no newline: what follows must be understood all the same
    if backend == "aborts":
        os.abort()
    if backend == "segfaults":
        os.kill(os.getpid(), signal.SIGSEGV)
    if backend == "exits":
        os._exit(3)
    if backend == "is killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if backend == "hangs" and shape[0] == 1:
        time.sleep(1000)
    _is_broken = backend == "breaks"
    return Verdict({"breaks": "illegal memory access", "refuses": "not here"}.get(backend), backend != "is short of memory")


def open_device(device, index):
    if device == "taken":
        raise RuntimeError("CUDA-capable device(s) is/are busy or unavailable\nmore of it")
    if device == "vanishes":
        os._exit(7)


def main_with_torch():
    import torch

    from fastmae.model.attention import trial
    from fastmae.model.attention.backends import Shape

    genuine = trial.attend

    def attend(packed, q, backend):
        if backend == "flash":
            os.abort()
        return genuine(packed, q, backend) * (1.1 if backend == "sdpa" else 1)

    trial.attend = attend

    def try_one(backend, device, dtype, shape):
        if backend == "breaks":  # as an illegal access does: nothing works any more in this process
            torch.zeros(4, device=device)[torch.full((4,), 1 << 20, device=device)].sum().item()
        return trial.try_out(backend, device, getattr(torch, dtype), Shape(*shape))

    return main(json.loads(sys.argv[-1]), trial.open_device, _caught(try_one), trial.answers)


def _caught(function):
    def call(*arguments):
        try:
            return function(*arguments)
        except RuntimeError as error:
            return Verdict(str(error).partition("\n")[0])

    return call


if __name__ == "__main__":
    if "torch" in sys.argv[1:-1]:
        sys.exit(main_with_torch())
    sys.exit(main(json.loads(sys.argv[-1]), open_device, try_out, lambda device: not _is_broken))
