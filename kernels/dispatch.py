"""Which implementation of an op runs: the Triton kernel or its plain-torch twin.

``FASTMAE_KERNELS`` is read at every call: ``auto`` (default) takes Triton for CUDA tensors and the twin elsewhere,
``torch`` always the twin, ``triton`` always the kernel. With ``TRITON_INTERPRET=1`` set before Python starts, ``triton``
also runs on CPU tensors, slowly, in Triton's interpreter.
"""

import os

import torch
import triton
from torch import Tensor

MODES = ("auto", "triton", "torch")
INTERPRETED = triton.knobs.runtime.interpret  # fixed by the environment when triton is imported


def mode() -> str:
    """The value of ``FASTMAE_KERNELS``, one of ``MODES``. Raises ValueError on any other."""
    value = os.environ.get("FASTMAE_KERNELS", "auto")
    if value not in MODES:
        raise ValueError(f"FASTMAE_KERNELS must be one of {', '.join(MODES)}, got {value!r}")
    return value


def warps(block: int) -> int:
    """Warps of a program that holds ``block`` values: enough that no patch size spills registers."""
    return min(16, max(4, block // 512))


def programs(tiles: int, most: int) -> int:
    """Programs that share ``tiles`` as equally as at most ``most`` can. Not of the device, so that partial sums are the same
    everywhere; ``tiles`` may be symbolic."""
    return triton.cdiv(tiles, torch.sym_max(1, triton.cdiv(tiles, most)))


def use_triton(x: Tensor) -> bool:
    """Whether ops on ``x`` run their Triton kernel. float64 never does: it is the dtype of test oracles."""
    chosen = mode()
    if chosen == "torch" or x.dtype == torch.float64:
        return False
    if chosen == "triton" and not x.is_cuda and not INTERPRETED:
        raise ValueError(f"FASTMAE_KERNELS=triton needs CUDA tensors (or TRITON_INTERPRET=1), got one on {x.device}")
    return chosen == "triton" or (x.is_cuda and not INTERPRETED)
