"""A GPU that is only described: torch and Triton work on fake tensors as if it were there.

torch itself does all of it, with any build: only what would ask a driver is answered from a data sheet. The graph of
gradients is walked in Python, because autograd's engine asks the driver for streams. The process that enters ``described``
should do nothing else afterwards (``predict`` starts one). Torch's private names that this takes are here and in ``lower``.
"""

import contextlib
import ctypes
import heapq
import itertools
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
import triton
from torch import Tensor, nn
from torch._dynamo.device_interface import CudaInterface
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config
from torch._inductor.constant_folding import ConstantFolder
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import get_gradient_edge
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget

from fastmae.benchmarks.traffic.gpus import GPU

_DEVICE = torch.device("cuda", 0)
_CUDA, _META, _DEVICE_TYPES = 1, 14, 22  # of c10's DeviceType


@contextlib.contextmanager
def described(gpu: GPU) -> Iterator[None]:
    """Inside, tensors on ``cuda`` are fake ones on ``gpu``."""
    _guard_device()
    properties = types.SimpleNamespace(
        name=gpu.name, major=gpu.capability[0], minor=gpu.capability[1], multi_processor_count=gpu.processors,
        total_memory=gpu.memory, L2_cache_size=gpu.cache, shared_memory_per_multiprocessor=gpu.shared_memory,
        shared_memory_per_block_optin=gpu.shared_memory_per_block, shared_memory_per_block=48 << 10, warp_size=32,
        regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048, max_threads_per_block=1024, is_integrated=False,
        gcnArchName="", uuid="described",
    )  # fmt: skip
    answers = [
        *((torch.cuda, name, answer) for name, answer in {
            "is_available": True, "device_count": 1, "current_device": 0, "_lazy_init": None, "_exchange_device": 0,
            "_maybe_exchange_device": 0, "is_bf16_supported": True, "get_device_capability": gpu.capability,
            "get_device_properties": properties, "get_device_name": gpu.name,
            "get_rng_state": torch.zeros(16, dtype=torch.uint8), "set_rng_state": None}.items()),
        *((part, "get_device_properties", properties) for part in (CudaInterface, CudaInterface.Worker)),
        (CudaInterface, "get_compute_capability", 10 * gpu.capability[0] + gpu.capability[1]),
        (CudaInterface, "is_available", True),
    ]  # fmt: skip
    with contextlib.ExitStack() as stack:
        for owner, name, answer in answers:
            stack.enter_context(mock.patch.object(owner, name, lambda *_, _answer=answer, **__: _answer))
        stack.enter_context(mock.patch.object(FakeTensorMode, "avoid_device_init", True))
        stack.enter_context(mock.patch.object(fake_tensor, "init_gpu_context", lambda *_: None))
        stack.enter_context(mock.patch.object(torch.autograd, "grad", gradients))
        stack.enter_context(mock.patch.object(F, "scaled_dot_product_attention", _flash))
        stack.enter_context(inductor_config.patch(force_disable_caches=True, compile_threads=1, shape_padding=False))
        stack.enter_context(mock.patch.object(functorch_config, "enable_autograd_cache", False))
        run = ConstantFolder.run
        stack.enter_context(mock.patch.object(ConstantFolder, "run", lambda *a, **k: _on_cpu(run, *a, **k)))
        triton.runtime.driver.set_active(_Driver(gpu))
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield


def fake(module: nn.Module) -> nn.Module:
    """``module``, with fake parameters and buffers on the described GPU. Inside ``described``."""
    for part in module.modules():
        for name, x in part._parameters.items():
            if x is not None:
                part._parameters[name] = nn.Parameter(torch.empty_like(x, device=_DEVICE), x.requires_grad)
        for name, x in part._buffers.items():
            if x is not None:
                part._buffers[name] = torch.empty_like(x, device=_DEVICE)
    return module


def _guard_device() -> None:
    """Make autograd take tensors on ``cuda``. A torch without CUDA has no guard for its devices: that of ``meta``, which does
    nothing, stands in."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * _DEVICE_TYPES).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    if guards[_CUDA] is None:
        guards[_CUDA] = guards[_META]
    torch._C._ensureCUDADeviceGuardSet()  # the same for a torch with CUDA, where there is no GPU


class _Driver:
    """Triton's driver of the described GPU."""

    def __init__(self, gpu: GPU):
        major, minor = gpu.capability
        self._target = GPUTarget("cuda", 10 * major + minor, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return _DEVICE


class _OnCPU(TorchDispatchMode):
    """New tensors are real ones on the CPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if kwargs.get("device") is not None:
            kwargs["device"] = torch.device("cpu")
        return func(*args, **kwargs)


def _on_cpu(run: Callable, *args, **kwargs):
    """Folding of constants makes tensors of one element to look at."""
    with _OnCPU():
        return run(*args, **kwargs)


def _flash(q: Tensor, k: Tensor, v: Tensor, *_, **__) -> Tensor:
    """What ``scaled_dot_product_attention`` calls on the GPU: torch's flash attention."""
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]


def gradients(outputs, inputs, grad_outputs=None, retain_graph=None, create_graph=False, allow_unused=None, **_) -> tuple:
    """``torch.autograd.grad``, walking the graph in the order of autograd's engine, without its streams."""
    outputs, inputs = ([x] if isinstance(x, Tensor) else list(x) for x in (outputs, inputs))
    given = (
        [None] * len(outputs) if grad_outputs is None else [grad_outputs] if isinstance(grad_outputs, Tensor) else grad_outputs
    )
    wanted: dict[tuple, list[int]] = {}
    for i, x in enumerate(inputs):
        edge = get_gradient_edge(x)
        wanted.setdefault((edge.node, edge.output_nr), []).append(i)
    grads: dict[object, dict[int, Tensor]] = {}

    def add(node, number: int, grad: Tensor) -> None:
        own = grads.setdefault(node, {})
        own[number] = own[number] + grad if number in own else grad

    roots = []
    for x, grad in zip(outputs, given, strict=True):
        edge = get_gradient_edge(x)
        add(edge.node, edge.output_nr, torch.ones_like(x) if grad is None else grad)
        roots.append(edge.node)
    awaited, known, stack = {}, set(), list(roots)
    while stack:
        if (node := stack.pop()) not in known:
            known.add(node)
            for following, _number in node.next_functions:
                if following is not None:
                    awaited[following] = awaited.get(following, 0) + 1
                    stack.append(following)
    order = itertools.count()
    ready = [(-n._sequence_nr(), next(order), n) for n in dict.fromkeys(roots) if n not in awaited]
    heapq.heapify(ready)
    found: list[Tensor | None] = [None] * len(inputs)
    with torch.set_grad_enabled(create_graph):
        while ready:
            _, _, node = heapq.heappop(ready)
            own = grads.pop(node, {})
            passed = [_fitted(own.get(i), shape) for i, shape in enumerate(node._input_metadata)]
            for i, grad in enumerate(passed):
                for j in wanted.get((node, i), ()):
                    found[j] = grad
            following = node.next_functions
            results = (node if callable(node) else node.apply)(*passed) if following and own else ()
            results = results if isinstance(results, tuple | list) else (results,)
            for (target, number), grad in zip(following, results, strict=False):
                if target is not None and grad is not None:
                    add(target, number, grad)
            for target, _number in following:
                if target is not None:
                    awaited[target] -= 1
                    if not awaited[target]:
                        heapq.heappush(ready, (-target._sequence_nr(), next(order), target))
    return tuple(found)


def _fitted(grad: Tensor | None, metadata) -> Tensor | None:
    """A gradient in the shape and dtype of what it is the gradient of, as the engine makes it."""
    if grad is None:
        return None
    grad = grad.sum_to_size(metadata.shape) if grad.shape != tuple(metadata.shape) else grad
    return grad.to(metadata.dtype) if grad.dtype != metadata.dtype else grad
