"""The kernels of a training graph, forward and backward, as torch.compile makes them for a described GPU.

    dynamo -> AOTAutograd -> Inductor: fusion, scheduling, code        -> nothing is compiled or launched

Where Inductor would compile the code that it has written, what it has scheduled is recorded. Bytes are those that a kernel
must move: each tensor, or the part of it that is touched, once, however often the code reads it. An operator that stays one (a
product, attention, one of ours) reads its inputs and writes its outputs once; ours are run, with their launches taken down.
"""

import math
import re
import types
from collections.abc import Callable, Iterator, Sequence
from unittest import mock

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch._inductor.codegen.wrapper import PythonWrapperCodegen
from torch._inductor.dependencies import MemoryDep, WeakDep
from torch._inductor.graph import GraphLowering
from torch._inductor.ir import MultiOutput
from torch._inductor.scheduler import Scheduler
from torch._inductor.virtualized import V
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.jit import JITFunction

from fastmae.benchmarks.traffic.described import gradients
from fastmae.benchmarks.traffic.kernel import CHUNK, Attention, Kernel, Product

_FINAL_SUM = re.compile(r"= workspace_?\d*\[.*\.view\((\d+), (\d+)\)\.sum\(dim=0\)(\.view\(.*?\))?(\.to\()?")
_OVERWRITES = ("::zero_", "::fill_", "::copy_", "::_foreach_copy_")
_CREATES = ("empty", "new_empty", "lift_fresh", "detach", "_unsafe_view", "_local_scalar_dense", "is_same_size")


def compiled_kernels(loss: Callable[[], Tensor], parameters: Sequence[Tensor]) -> list[Kernel]:
    """The kernels of ``loss``, which calls something that torch.compile has taken, and of its gradients."""
    found: list[Kernel] = []
    weights = _weight_sizes(parameters)

    def compile_to_module(graph: GraphLowering) -> types.SimpleNamespace:
        found.extend(_Recorder(graph, weights).kernels())
        outputs = next(n for n in graph.module.graph.nodes if n.op == "output").args[0]
        results = [n.meta["val"] if isinstance(n, torch.fx.Node) else n for n in outputs]
        return types.SimpleNamespace(call=lambda _: results, runner=None)

    torch._dynamo.reset()
    with mock.patch.object(GraphLowering, "compile_to_module", compile_to_module):
        gradients(loss(), parameters)
    return found


def eager_kernels(loss: Callable[[], Tensor], parameters: Sequence[Tensor]) -> list[Kernel]:
    """The same without a compiler: every operator is a launch that reads its inputs and writes its outputs once."""
    mode = _Operators(_weight_sizes(parameters))
    with mode:
        result = loss()
        mode.is_backward = True
        gradients(result, parameters)
    return mode.kernels


class _Operators(TorchDispatchMode):
    """Records the operators that launch something: not views, and not what only allocates."""

    def __init__(self, weights: frozenset[int] = frozenset()):
        super().__init__()
        self.weights = weights
        self.kernels: list[Kernel] = []
        self.is_backward = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        returns = func._schema.returns
        is_view = bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        space, _, name = func._schema.name.partition("::")
        if not is_view and space != "prim" and not name.startswith(_CREATES):
            self.kernels.append(_operator(func, (*args, *(kwargs or {}).values()), results, self.is_backward, self.weights))
        return results


def _weight_sizes(parameters: Sequence[Tensor]) -> frozenset[int]:
    """Elements of the weights, and of the parts of qkv."""
    return frozenset(n for p in parameters for n in (p.numel(), p.numel() // 3, p.numel() // 3 * 2))


def _operator(func, args: Sequence[object], results: object, is_backward: bool, weights: frozenset[int]) -> Kernel:
    """What a call of ``func`` launches, reads and writes."""
    name = func._schema.name
    inputs, outputs = ([x for x in tree_leaves(v) if isinstance(x, Tensor)] for v in (list(args), results))
    places = [i for i, a in enumerate(func._schema.arguments) if a.alias_info is not None and a.alias_info.is_write]
    changed = [x for x in tree_leaves([args[i] for i in places if i < len(args)]) if isinstance(x, Tensor)]
    read = [x for x in inputs if not (name.endswith(_OVERWRITES) and any(x is y for y in changed))]
    read = list({(x.untyped_storage()._cdata, x.storage_offset(), tuple(x.shape)): x for x in read}.values())
    written = changed or outputs
    size = sum(_touched(x) for x in [*read, *written])
    names = _launches(name, args) if name.startswith("fastmae::") else (name,)
    is_small = max((x.numel() for x in [*read, *written]), default=0) in weights
    blocks = sum(math.ceil(x.numel() / CHUNK) for x in outputs) if name == "fastmae::cast_all" else None
    return Kernel(names, size, (name,), tuple(_shown(x) for x in [*read, "->", *written]), is_backward, is_small,
                  _work(name, inputs, outputs), blocks)  # fmt: skip


def _launches(name: str, args: Sequence[object]) -> tuple[str, ...]:
    """Of one of our operators: its kernels, and torch's own operators around them."""
    launched: list[str] = []

    def run(kernel: JITFunction, *_, **__) -> None:
        launched.append(kernel.__name__)

    with mock.patch.object(JITFunction, "run", run), detect_fake_mode(args), _Operators() as around:
        OPDEFS[name]._init_fn(*args)
    return (*launched, *(n for k in around.kernels for n in k.names))


def _work(name: str, inputs: list[Tensor], outputs: list[Tensor]) -> Product | Attention | None:
    """What a product or an attention computes; None for others."""
    short = name.partition("::")[2]
    if short in ("mm", "addmm", "bmm", "baddbmm"):
        a, b = (x.shape for x in inputs[-2:])
        return Product(math.prod(a[:-2]), a[-2], b[-1], a[-1])
    if short == "convolution":
        weight = inputs[1].shape
        return Product(1, outputs[0].numel() // weight[0], weight[0], math.prod(weight[1:]))
    if short == "convolution_backward":
        weight = inputs[2].shape
        return Product(1, weight[0], math.prod(weight[1:]), inputs[0].numel() // weight[0])
    if "flash_attention" in short:
        is_backward = short.endswith("backward")
        q, k = (x.shape for x in inputs[is_backward : 2 + is_backward])
        return Attention(q[0], q[1], q[2], k[2], q[3], is_backward, False)
    if "short_attention" in short:
        packed = next(x for x in inputs if x.ndim == 5).shape
        rows = next((x for x in inputs if x.ndim == 4), outputs[0]).shape
        return Attention(packed[0], packed[3], rows[1], packed[1], packed[4], short.endswith("bwd"), True)
    return None


def _touched(x: Tensor) -> int:
    """Bytes of the elements of ``x``; those of an expanded dimension are one."""
    return x.element_size() * math.prod(n for n, stride in zip(x.shape, x.stride(), strict=True) if stride or n == 0)


def _shown(x: Tensor | str) -> str:
    return x if isinstance(x, str) else f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}"


class _Recorder:
    """The kernels of a graph, as Inductor's scheduler has fused them and its wrapper calls them."""

    def __init__(self, graph: GraphLowering, weights: frozenset[int]):
        self.graph, self.weights = graph, weights
        self.calls: dict[object, list[str]] = {}  # of each scheduled node, in order
        self.sums: dict[object, list[tuple[int, int]]] = {}  # of nodes that keep partial sums in a workspace

    def kernels(self) -> list[Kernel]:
        """In the order of their launches."""
        recorder, call, extern, line = self, *(
            getattr(owner, name) for owner, name in ((PythonWrapperCodegen, "generate_kernel_call"),
                                                     (Scheduler, "codegen_extern_call"), (PythonWrapperCodegen, "writeline"))
        )  # fmt: skip

        def generate_kernel_call(wrapper, name, *args, **kwargs):
            recorder.calls.setdefault(recorder.graph.scheduler.current_node, []).append(name)
            return call(wrapper, name, *args, **kwargs)

        def codegen_extern_call(scheduler, node):
            if not isinstance(node.node, MultiOutput):
                recorder.calls.setdefault(node, [])
            return extern(scheduler, node)

        def writeline(wrapper, text):
            if isinstance(text, str) and (match := _FINAL_SUM.search(text)):
                rows, columns, is_cast = int(match[1]), int(match[2]), bool(match[4])
                recorder.sums.setdefault(recorder.graph.scheduler.current_node, []).append((rows * columns, columns, is_cast))
            return line(wrapper, text)

        with (
            mock.patch.object(PythonWrapperCodegen, "generate_kernel_call", generate_kernel_call),
            mock.patch.object(Scheduler, "codegen_extern_call", codegen_extern_call),
            mock.patch.object(PythonWrapperCodegen, "writeline", writeline),
        ):
            self.graph.codegen()
        with V.set_graph_handler(self.graph):
            return [kernel for node, names in self.calls.items() for kernel in self._of(node, names)]

    def _of(self, node, names: list[str]) -> Iterator[Kernel]:
        if node.is_extern():
            origin = _origin(node.node)
            value = lambda n: n.meta.get("val") if isinstance(n, torch.fx.Node) else n  # noqa: E731
            args = torch.fx.map_arg((origin.args, tuple(origin.kwargs.values())), value)
            yield _operator(origin.target, (*args[0], *args[1]), origin.meta["val"], self.graph.is_backward, self.weights)
            return
        sums = self.sums.get(node, [])
        parts = {}
        for dep in [*node.read_writes.reads, *node.read_writes.writes]:
            if not isinstance(dep, WeakDep) and dep.name not in self.graph.removed_buffers:
                parts.setdefault(dep.name, []).append(dep)
        size, largest, tensors = 4 * sum(n for n, _, _ in sums), 0, []
        for name, deps in parts.items():
            touched = min(int(self.graph.get_numel(name)), sum(_numel(d) for d in set(deps)))
            dtype = self.graph.get_dtype(name)
            size += dtype.itemsize * touched
            largest = max(largest, touched)
            tensors.append(f"{str(dtype).removeprefix('torch.')} {touched}")
        origins = sorted({str(o.target) for n in node.get_nodes() if n.node is not None for o in n.node.origins})
        yield Kernel(tuple(names), size, tuple(origins), tuple(tensors), self.graph.is_backward,
                     largest in self.weights)  # fmt: skip
        for partials, columns, is_cast in sums:
            names = ("reduce_kernel<sum_functor>", *(["bfloat16_copy_kernel_cuda"] if is_cast else []))
            size = 4 * (partials + columns) + 6 * columns * is_cast
            yield Kernel(names, size, ("partial sums",), (), self.graph.is_backward)


def _origin(node) -> torch.fx.Node:
    """The operator of the graph that an operator left as it is comes from."""
    if (origin := node.get_origin_node()) is not None:
        return origin
    names = node.python_kernel_name.removesuffix(".default").split(".")
    found = [n for n in node.origins if str(n.target).split(".")[1:2] == names[-1:]]
    assert len(found) == 1, (node.python_kernel_name, node.origins)
    return found[0]


def _numel(dep) -> int:
    """Elements that a kernel touches; by an index that is read, at most as many as it has iterations."""
    if isinstance(dep, MemoryDep) and dep.is_indirect():
        return math.prod(int(n) for n in dep.size)
    return int(dep.get_numel())
