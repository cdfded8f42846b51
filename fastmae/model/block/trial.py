"""One block, forward and backward on random tensors: how a way to compute it is tried and timed."""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from fastmae.model.attention.backends import Shape, prepare
from fastmae.model.attention.trial import Verdict, verdict_on
from fastmae.model.block.block import Block
from fastmae.model.block.choice import BlockShape
from fastmae.model.config import FUSED

_BATCH = 2  # images of a trial
_TOLERANCE = 2e-2  # relative, against the plain block in eager mode: several roundings of bf16, far below any mistake
TRIED = (*FUSED, "short")
"""What is tried in a block by itself: an operation of ``config.FUSED``, or our own attention."""


class Variant(NamedTuple):
    """One way to compute a block."""

    attention: str
    fused: tuple[str, ...] = ()

    def __str__(self) -> str:
        return " + ".join((f"attention {self.attention}", *self.fused))

    @classmethod
    def of(cls, name: str) -> "Variant":
        """The one that shows whether ``name``, of ``TRIED``, works: attention with its bias gradient, as in a fused block,
        beside the one operation that has no kernel of ours."""
        return cls("math", (name,)) if name in FUSED else cls(name, ("linear",))


class Trial:
    """A block with random weights, a batch of ``images``, and the gradient of its results.

    ``dtype``: of the products, by autocast if it is not float32. ``residual``: of the stream.
    """

    def __init__(self, device_type: str, dtype: torch.dtype, residual: torch.dtype, shape: BlockShape, images: int):
        self._device, self._dtype, self._shape = device_type, dtype, shape
        N, first, D, *_ = shape
        # A generator of its own, so that later draws do not change.
        draw = partial(torch.randn, device=device_type, generator=torch.Generator(device_type).manual_seed(0))
        self._x, self._branch = draw(images, N, D, dtype=residual), draw(images, N, D, dtype=dtype)
        self._gradients = [draw(images, N - first, D, dtype=kind) for kind in (residual, dtype)]
        # Moved from where they begin: an operation that ignores a scale of 1 or a bias of 0 must not be right.
        self._weights = {name: p.detach() + 0.1 * draw(p.shape) * (1 if p.ndim == 1 else p.shape[1] ** -0.5)
                         for name, p in self._new("off").named_parameters()}  # fmt: skip
        self._branch_bias = draw(D)

    def eager(self, variant: Variant) -> dict[str, Tensor]:
        """Results and gradients of the block without a compiler, by name."""
        return self.run(variant, is_compiled=False)()

    def run(self, variant: Variant, is_compiled: bool) -> Callable[[], dict[str, Tensor]]:
        """A pass of the block, forward and backward."""
        prepare(variant.attention)
        block = self._new(",".join(variant.fused) or "off", variant.attention)
        block.load_state_dict(self._weights)
        call = torch.compile(block, dynamic=False) if is_compiled else block
        inputs = {"x": self._x, "branch": self._branch}
        trained = dict(block.named_parameters())
        if "add_norm" in variant.fused:  # the gradient of fc2's bias is the next block's to make, and here that of the last one
            del trained["mlp.fc2.bias"]
            inputs["branch_bias"] = self._branch_bias
        inputs = {name: t.detach().requires_grad_() for name, t in inputs.items()}

        def pass_() -> dict[str, Tensor]:
            is_low = self._dtype != torch.float32
            with torch.autocast(self._device, dtype=self._dtype if is_low else None, enabled=is_low):
                x, branch, _ = call(inputs["x"], inputs["branch"], inputs.get("branch_bias"), self._shape.first)
            wanted = inputs | trained
            gradients = torch.autograd.grad([x, branch], list(wanted.values()), self._gradients)
            return {"sum": x.detach(), "last branch": branch.detach()} | dict(zip(wanted, gradients, strict=True))

        return pass_

    def _new(self, fused: str, attention: str = "math") -> Block:
        _, _, D, heads, hidden = self._shape
        with torch.random.fork_rng(devices=[]):  # drawn on the CPU
            return Block(D, heads, hidden / D, attention, fused).to(self._device)


def check(found: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    """Raise ArithmeticError if a result or gradient is further from that of the plain block, ``exact``, than roundings are."""
    exact = exact | {"branch_bias": exact["branch"].flatten(0, -2).sum(0, dtype=torch.float32)}
    errors = {name: float((t.float() - exact[name].float()).norm() / exact[name].float().norm()) for name, t in found.items()}
    worst = max(errors, key=lambda name: errors[name] if math.isfinite(errors[name]) else math.inf)
    if not errors[worst] <= _TOLERANCE:
        raise ArithmeticError(f"{worst} differs from the plain block's by {errors[worst]:.1g} of its norm")


def try_out(name: str, device_type: str, dtype: torch.dtype, residual: torch.dtype, shape: BlockShape) -> Verdict:
    """Whether ``name``, of ``TRIED``, works in a block of ``shape`` with few images, uncompiled."""

    def attempt() -> None:
        trial = Trial(device_type, dtype, residual, shape, _BATCH)
        check(trial.eager(Variant.of(name)), trial.eager(Variant("math")))

    return verdict_on(attempt, device_type)


def attention_of(shape: BlockShape) -> Shape:
    """The shape of the attention in a block of ``shape``."""
    return Shape(shape.tokens - shape.first, shape.tokens, shape.heads, shape.dim // shape.heads)
