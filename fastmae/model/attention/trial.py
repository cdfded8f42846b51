"""Attention forward and backward on random tensors of a block's shapes: how a backend is tried and timed."""

import math
import re
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from fastmae.model.attention.backends import Shape, attend, prepare

_BATCH = 2  # images of a trial
_COMPARED = 1 << 28  # elements of attention matrices that math stores for a comparison: 1 GiB in fp32
NO_MEMORY = re.compile("out of memory|ALLOC_FAILED", re.I)  # of the driver, and of cuBLAS and cuDNN
_TOLERANCE = 2e-2  # relative, against SDPA's math: several times the rounding of bf16, far below any mistake


class Verdict(NamedTuple):
    """The outcome of a trial of a backend."""

    reason: str | None
    """Why the backend does not work, in one line; None if it does."""
    lasts: bool = True
    """Whether another process would find the same, as it might not after a lack of memory."""


class Inputs(NamedTuple):
    """Inputs of attention and its gradients."""

    q: Tensor
    """Queries (B, N, 1, H, d), unless they are in ``packed``."""
    packed: Tensor
    """Keys and values (B, M, 2, H, d), or, where N = M, queries, keys and values (B, M, 3, H, d)."""
    weight: Tensor
    """The gradient of the output, (B, N, H, d)."""

    @classmethod
    def draw(cls, device_type: str, dtype: torch.dtype, shape: Shape, B: int) -> "Inputs":
        """Normally distributed inputs for ``B`` images."""
        N, M, H, d = shape
        generator = torch.Generator(device_type).manual_seed(0)  # its own, so that later draws do not change
        draw = partial(torch.randn, device=device_type, dtype=dtype, generator=generator)
        q, packed = draw(B, N, 1, H, d).requires_grad_(), draw(B, M, 3 if N == M else 2, H, d).requires_grad_()
        return cls(q, packed, draw(B, N, H, d))

    def first_heads(self, H: int) -> "Inputs":
        """The first ``H`` heads."""
        q, packed = (x.detach()[..., :H, :].requires_grad_() for x in (self.q, self.packed))
        return Inputs(q, packed, self.weight[..., :H, :])


def forward_backward(backend: str, inputs: Inputs) -> list[Tensor]:
    """A pass by a ``prepare``d backend: its result and gradients, each (..., H, d)."""
    q, packed, weight = inputs
    is_self = packed.shape[2] == 3
    out = attend(packed, None if is_self else q[:, :, 0], backend)
    return [out.detach(), *torch.autograd.grad(out, [packed] if is_self else [packed, q], weight)]


def try_out(backend: str, device_type: str, dtype: torch.dtype, shape: Shape) -> Verdict:
    """Run ``backend`` forward and backward on ``shape``, with few images but all tokens and heads, and compare it with math."""
    B, N, M, H = _BATCH, *shape[:3]

    def attempt() -> None:
        prepare(backend)
        inputs = Inputs.draw(device_type, dtype, shape, B)
        heads = max(1, min(H, _COMPARED // (B * N * M)))  # heads are independent
        found = [x[..., :heads, :] for x in forward_backward(backend, inputs)]
        error = _error(found, forward_backward("math", inputs.first_heads(heads)))
        if error > _TOLERANCE:
            raise ArithmeticError(f"differs from math attention by {error:.1g} of its norm")

    return verdict_on(attempt, device_type)


def verdict_on(attempt: Callable[[], None], device_type: str) -> Verdict:
    """The verdict on what ``attempt`` tries, which raises where it does not work: ArithmeticError if it computes wrongly."""
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device_type, enabled=False):
            attempt()
    except ArithmeticError as error:
        return Verdict(str(error))
    except Exception as error:  # whatever a third-party kernel raises is its verdict
        return Verdict(_line(error), lasts=not (isinstance(error, torch.OutOfMemoryError) or NO_MEMORY.search(str(error))))
    return Verdict(None)


def open_device(device_type: str, index: int | None) -> None:
    """Initialise the device, of number ``index`` if there are several. Raises RuntimeError if it cannot be."""
    if device_type == "cuda":
        torch.cuda.set_device(index or 0)
    torch.ones(1, device=device_type).item()


def answers(device_type: str) -> bool:
    """Whether the device still computes: after an illegal access it does not, in the process that made it."""
    try:
        return torch.ones(1, device=device_type).item() == 1
    except torch.OutOfMemoryError:  # a full device works
        return True
    except RuntimeError:
        return False


def _error(found: list[Tensor], exact: list[Tensor]) -> float:
    """The largest error of result and gradients in the L2 norm, relative to the result's and to the largest gradient's;
    infinity if something is not finite."""
    off = [float((f.float() - e.float()).norm()) for f, e in zip(found, exact, strict=True)]
    norm, *gradients = [float(e.float().norm()) for e in exact]  # with a single key the gradient of the queries is zero
    errors = [o / scale for o, scale in zip(off, [norm] + [max(gradients)] * len(gradients), strict=True)]
    return max(error if math.isfinite(error) else math.inf for error in errors)


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
