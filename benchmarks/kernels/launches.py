"""Triton's launches of an op, recorded without a GPU.

The op runs on CPU tensors as it would on a GPU's, and ``JITFunction.run`` itself binds the arguments: which integers are 1 or
divisible by 16, which pointers are aligned, how many warps. Triton's own hook then takes the launch before it is compiled, so
what is recorded is the launch itself. Outputs stay as ``torch.empty`` made them.
"""

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.driver import driver

from fastmae.kernels import dispatch


@dataclass(frozen=True, kw_only=True, eq=False)
class Launch:
    """A kernel with all that its binary depends on."""

    kernel: triton.JITFunction
    signature: dict[str, str]
    """Of each argument its type, or ``constexpr``."""
    constants: dict[tuple[int, ...], Any]
    """Of the arguments at these positions their values: those declared so, and integers that are 1."""
    attributes: dict[tuple[int, ...], list]
    """What Triton assumes of the arguments at these positions: ``tt.divisibility``, or nothing."""
    options: dict[str, Any]
    """``num_warps``, ``num_stages`` and the rest."""
    target: int
    """Compute capability; 80 is 8.0."""

    @property
    def name(self) -> str:
        """The kernel's, without what all have in common."""
        return self.kernel.__name__.removeprefix("_").removesuffix("_kernel")

    @property
    def key(self) -> str:
        """Equal for launches of one binary."""
        return repr((self.kernel, self.signature, self.constants, self.attributes, self.options, self.target))

    def compile(self) -> triton.compiler.CompiledKernel:
        """The binary."""
        source = ASTSource(self.kernel, self.signature, self.constants, self.attributes)
        return triton.compile(source, target=_gpu(self.target), options=self.options)


class _DescribedGPU:
    """Triton's driver of a GPU that is only described: a launch can be bound to its arguments, and goes no further."""

    def __init__(self, target: int):
        self._target = target

    def get_current_device(self) -> str:
        return f"sm_{self._target}, described"  # kernels keep what they know of a device by this

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return _gpu(self._target)


def _gpu(target: int) -> GPUTarget:
    return GPUTarget("cuda", target, 32)  # threads of a warp


def launches(call: Callable[[], object], target: int) -> list[Launch]:
    """The launches of ``call`` on CPU tensors, in order, as on a GPU of compute capability ``target``.

    Raises RuntimeError in Triton's interpreter, where nothing is compiled.
    """
    if dispatch.INTERPRETED:
        raise RuntimeError("launches cannot be recorded in Triton's interpreter: unset TRITON_INTERPRET")
    found: list[Launch] = []

    def take(*, fn: Any, compile: dict[str, Any], **_: object) -> bool:
        options = json.loads(compile["specialization_data"])["options"]
        options = {name: tuple(v) if isinstance(v, list) else v for name, v in options.items()}
        found.append(
            Launch(
                kernel=fn.jit_function, signature=compile["signature"], constants=compile["constants"],
                attributes=compile["configs"][0], options=options, target=target,
            )
        )  # fmt: skip
        return True  # compile nothing, and launch nothing

    with _described(target), triton.knobs.runtime.scope():
        triton.knobs.runtime.jit_cache_hook = take
        call()
    return found


@contextlib.contextmanager
def _described(target: int) -> Iterator[None]:
    """Inside, ops on CPU tensors launch their kernels, on a described GPU."""
    before = driver._active  # ``active`` would look for a GPU
    driver.set_active(_DescribedGPU(target))
    try:
        with mock.patch.object(dispatch, "INTERPRETED", True), mock.patch.dict(os.environ, FASTMAE_KERNELS="triton"):
            yield
    finally:
        driver.set_active(before)
