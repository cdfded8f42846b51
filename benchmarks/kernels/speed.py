"""``kernels``: each op by its Triton kernel, by its plain twin, and by the twin through torch.compile.

Time is the device's alone: on a GPU the calls are one CUDA graph. A backward pass is the difference of both passes and the
forward one. Bytes are the fewest that the op must move (each input read once, each output written once), compared with a
copy measured in the same run. Inputs rotate through more memory than the cache holds.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fastmae.benchmarks.kernels.cases import CASES, Case, Sizes
from fastmae.benchmarks.machine import copy_bytes
from fastmae.benchmarks.timing import LossesDiffer, device_seconds
from fastmae.kernels.dispatch import use_triton
from fastmae.model.config import preset

_CPU_CACHE = 64 * 2**20  # bytes, assumed
_MOST_SETS = 32
_TOLERANCE = 1e-2  # relative, of the norm of bf16 results that were rounded in different places
_MOST = 2e-2  # of the greatest value: two units of bf16's last place. By its norm alone one wrong row of thousands is none


def measure_kernels(models: list[str], batch: int | None, device: torch.device) -> dict[str, object]:
    """The section ``kernels`` of a result: the copy rate, and a row for each op, model and body."""
    on_gpu = device.type == "cuda"
    batch = batch or (256 if on_gpu else 16)
    dtype = torch.bfloat16 if on_gpu else torch.float32
    copy, rows, notes = copy_bytes(device), [], []
    if not use_triton(torch.empty(0, device=device)):
        notes.append("no row for Triton: its kernels need a CUDA device")
    for model in models:
        sizes = Sizes.of(preset(model), batch)
        for case in CASES:
            for body, function in bodies(case, device).items():
                check_equal(case, body, function, case.inputs(sizes, device, dtype))
                rows += [r | {"model": model, "batch": batch, "dtype": str(dtype).removeprefix("torch.")}
                         for r in _rows(case, body, function, sizes, device, dtype, copy)]  # fmt: skip
    return {"copy_bytes_per_second": copy, "rows": rows, "notes": notes}


def bodies(case: Case, device: torch.device) -> dict[str, Callable]:
    """What can run the op here: Triton's kernel, the twin, the twin compiled."""
    found = {"triton": case.op} if use_triton(torch.empty(0, device=device)) else {}
    found["twin"] = case.twin
    return {**found, "compiled twin": torch.compile(case.twin, dynamic=False)} if case.compiles else found


def check_equal(case: Case, body: str, function: Callable, inputs: tuple) -> None:
    """Raise LossesDiffer unless ``function`` gives the values and gradients of the twin, up to rounding."""
    found, expected = (_both(case, f, inputs)() if case.differentiable else _outputs(f, inputs) for f in (function, case.twin))
    for one, two in zip(found, expected, strict=True):
        error, size = (one.double() - two.double()).abs(), two.double().abs()
        if not (error.norm() <= _TOLERANCE * size.norm() and error.max() <= _MOST * size.max()):
            raise LossesDiffer(f"{case.name} by {body} differs from its twin")


def input_sets(case: Case, sizes: Sizes, device: torch.device, dtype: torch.dtype) -> list[tuple]:
    """Inputs that together are four times what the cache holds: at least two sets, at most ``_MOST_SETS``."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else _CPU_CACHE
    count = math.ceil(4 * cache / case.forward_bytes(sizes, dtype.itemsize))
    return [case.inputs(sizes, device, dtype) for _ in range(min(_MOST_SETS, max(2, count)))]


def _rows(case: Case, body: str, function: Callable, sizes: Sizes, device: torch.device, dtype: torch.dtype,
          copy: float) -> list[dict]:  # fmt: skip
    sets = input_sets(case, sizes, device, dtype)
    torch._dynamo.reset()
    with torch.no_grad():
        seconds = {"forward": device_seconds([_forward(function, s) for s in sets], device)}
    traffic = {"forward": case.forward_bytes(sizes, dtype.itemsize)}
    if case.differentiable:
        seconds["both"] = device_seconds([_both(case, function, s) for s in sets], device)
        seconds["backward"] = seconds["both"] - seconds["forward"]
        traffic["backward"] = case.backward_bytes(sizes, dtype.itemsize)
        traffic["both"] = traffic["forward"] + traffic["backward"]
    return [
        {
            "op": case.name,
            "body": body,
            "pass": name,
            "microseconds": 1e6 * s,
            "bytes": traffic[name],
            "bytes_per_second": traffic[name] / s,
            "share_of_copy": traffic[name] / s / copy,
        }
        for name, s in seconds.items()
        if s > 0
    ]


def _outputs(function: Callable, inputs: tuple) -> tuple[Tensor, ...]:
    results = function(*inputs)
    return results if isinstance(results, tuple) else (results,)


def _forward(function: Callable, inputs: tuple) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: _outputs(function, inputs)


def _both(case: Case, function: Callable, inputs: tuple) -> Callable[[], list[Tensor]]:
    wanted = [inputs[i] for i in case.differentiable]
    with torch.no_grad():
        outputs = _outputs(function, inputs)
    generator = torch.Generator(outputs[0].device).manual_seed(0)  # the same for every body
    gradients = [torch.randn(o.shape, dtype=o.dtype, device=o.device, generator=generator) for o in outputs]

    def run() -> list[Tensor]:
        outputs = _outputs(function, inputs)
        return [*(o.detach() for o in outputs), *torch.autograd.grad(outputs, wanted, gradients)]

    return run


def table(section: dict) -> list[list[str]]:
    """The section's table."""
    lines = [["model", "batch", "op", "body", "pass", "us", "GB/s", "of a copy"]]
    for r in section["rows"]:
        lines.append([r["model"], str(r["batch"]), r["op"], r["body"], r["pass"], f"{r['microseconds']:.1f}",
                      f"{r['bytes_per_second'] / 1e9:.1f}", f"{r['share_of_copy']:.0%}"])  # fmt: skip
    return lines
