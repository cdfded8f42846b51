"""What torch's NCCL process group does by itself when a process is lost: delayed, so that the watch has named it before.

Its watchdog thread ends the process (SIGABRT, exit code 134) four times TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC after it has seen
an error of the communicator, 60 s by default, less than a lost process is given at the start; its heartbeat monitor does so
when the watchdog has been stuck for twice TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC, 16 min, less than ``--first-timeout``. A collective
is timed out by the group's own timeout, which ``World.set_timeout`` keeps above the watch's. torchrun sets
TORCH_NCCL_ASYNC_ERROR_HANDLING to 1: the communicator is aborted first, so that kernels end and the main thread continues with
half-reduced gradients until the abort; torch's default, 3, ends the process with its kernels still waiting.

Source: torch/csrc/distributed/c10d, ProcessGroupNCCL.hpp (torch 2.13) and .cpp (main branch; Watchdog, HeartbeatMonitor).
"""

import os
from collections.abc import MutableMapping

NAMED_WITHIN = 120.0  # seconds in which the watch has named a lost process, at the start as well
_MARGIN = 60.0  # seconds that torch waits longer
_ERROR_WAITS = 4  # of TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC between an error and the end
_LONGEST = 86400.0  # seconds; torch keeps the milliseconds in 32 bits
_HANDLING = "TORCH_NCCL_ASYNC_ERROR_HANDLING"


def set_nccl_defaults(timeout: float, is_elastic: bool, environ: MutableMapping[str, str] = os.environ) -> None:
    """Set what the user has not set, before the group is made. ``timeout``: the watch's longest, seconds; ``is_elastic``:
    torchrun's agent has started this process, and set its own default."""
    dump = (NAMED_WITHIN + _MARGIN) / _ERROR_WAITS
    environ.setdefault("TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC", str(round(1000 * dump)))
    environ.setdefault("TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC", str(round(min(timeout + _MARGIN, _LONGEST))))
    if is_elastic and environ.get(_HANDLING) == "1":  # torchrun's, not the user's
        environ[_HANDLING] = "3"
