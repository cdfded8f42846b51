"""``kernels --check``: how exact each op is, by its Triton kernel and by its twin, beside torch's own operations.

Of every output and every gradient the greatest error against float64 over several draws of random inputs, in ulps of its
dtype (eps times the greatest magnitude of the exact result) and relative to that magnitude. An op may err twice as much as
torch's own operations do on the same inputs, plus one ulp. Integers have levels instead: indices must be equal, and a pixel
may lie half a level from the exact one, which rounding costs, and float32's own error.
"""

import math
import os
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from torch import Tensor

from fastmae.benchmarks.kernels.formulas import FORMULAS, Formula
from fastmae.benchmarks.kernels.shape import Shape
from fastmae.benchmarks.machine import lacks_memory
from fastmae.errors import InputError
from fastmae.kernels import dispatch

_DRAWS = 4  # one loss may be exact by luck
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MODES = {"triton": "triton", "interpreter": "triton", "twin": "torch"}  # a backend's FASTMAE_KERNELS
_PIXEL_LEVELS = 0.51
_NEEDS = "its kernels need a CUDA device, or TRITON_INTERPRET=1"


ON_CPU = (Shape(),)
ON_GPU = (Shape(), Shape(B=8, H=224, W=224, p=16, D=768))


def measure_errors(shapes: list[str] | None, device: torch.device) -> dict[str, object]:
    """The section ``kernels check`` of a result: a row for each op, dtype, backend and tensor, and in ``wrong`` a line for each
    that errs more than is allowed.

    Raises InputError on a shape that is none or does not fit into memory, and if nothing can run.
    """
    default = ON_GPU if device.type == "cuda" else ON_CPU
    chosen, notes, rows = backends(device), [], []
    if not chosen:
        raise InputError(f"FASTMAE_KERNELS is triton, and {_NEEDS}")
    if "interpreter" in chosen:
        notes.append("Triton's interpreter runs float32 alone: it does not round bf16 and fp16 as a GPU does")
    elif "triton" not in chosen:
        is_off = dispatch.mode() == "torch"
        notes.append(f"no row for Triton: {'FASTMAE_KERNELS is torch' if is_off else _NEEDS}")
    for shape in [Shape.parse(text) for text in shapes] if shapes else default:
        for formula in FORMULAS:
            if formula.limit(shape):
                notes.append(f"{formula.name}, {shape}: {formula.limit(shape)}")
                continue
            for dtype in _DTYPES[:1] if formula.is_exact else _DTYPES:
                for backend in chosen:
                    if backend != "interpreter" or dtype == torch.float32:
                        rows += _rows(formula, backend, shape, device, dtype)
    wrong = [
        f"{r['op']} by {r['backend']}, inputs {r['inputs']}, {r['shape']}: {r['tensor']} errs by {r['error']:.3g} {r['unit']}, "
        f"allowed are {r['allowed']:.3g}"
        for r in rows
        if not r["error"] <= r["allowed"]
    ]
    return {"draws": _DRAWS, "rows": rows, "notes": notes, "wrong": wrong}


def backends(device: torch.device) -> list[str]:
    """What can run ops on ``device``; of those, what ``FASTMAE_KERNELS`` asks for."""
    kernels = ["interpreter"] if dispatch.INTERPRETED else ["triton"] if device.type == "cuda" else []
    asked = dispatch.mode()
    return [name for name in (*kernels, "twin") if asked in ("auto", _MODES[name])]


def _rows(formula: Formula, backend: str, shape: Shape, device: torch.device, dtype: torch.dtype) -> list[dict]:
    try:
        return [{"shape": str(shape), **row} for row in check(formula, backend, shape, device, dtype)]
    except RuntimeError as error:
        if not lacks_memory(error):
            raise
        raise InputError(f"shape must fit into memory, got {shape}: {formula.name} in {_name(dtype)} does not") from error


def check(formula: Formula, backend: str, shape: Shape, device: torch.device, dtype: torch.dtype) -> Iterator[dict]:
    """A row for each output and gradient of one op, whose activations have ``dtype``."""
    draws = []
    for seed in range(1 if formula.is_exact else _DRAWS):
        torch.manual_seed(seed)
        inputs = formula.inputs(shape, device, dtype)
        with mock.patch.dict(os.environ, FASTMAE_KERNELS=_MODES[backend]):
            outputs = _outputs(formula.op, inputs)
            gradients = [torch.randn_like(out) for out in outputs] if formula.differentiable else []
            found = _results(outputs, gradients, inputs, formula)
        own = _results(_outputs(formula.formula, inputs), gradients, inputs, formula)
        doubles = tuple(_double(value) for value in inputs)
        draws.append((found, own, _results(_outputs(formula.formula, doubles), gradients, doubles, formula)))
    names = (*formula.outputs, *(f"gradient of {name}" for name in formula.differentiable))
    for i, name in enumerate(names):
        tensors = [torch.stack([draw[who][i] for draw in draws]) for who in range(3)]
        row = {"op": formula.name, "tensor": name, "backend": backend, "inputs": _name(dtype), "dtype": _name(tensors[0].dtype)}
        yield row | compare(*tensors)


def compare(found: Tensor, own: Tensor, exact: Tensor) -> dict[str, object]:
    """The greatest errors of an op and of torch's own operations against ``exact``, and what is allowed.

    A result of another dtype than torch's, or one that is not finite, has no error that could be allowed.
    """
    error, torch_error = (_greatest(result, exact) for result in (found, own))
    if found.dtype != own.dtype or not math.isfinite(error):
        error = float("nan")
    if not found.is_floating_point():
        allowed = _PIXEL_LEVELS if found.dtype == torch.uint8 else 0.0
        return {"unit": "levels", "error": error, "torch_error": torch_error, "allowed": allowed}
    scale = max(exact.abs().max().item(), torch.finfo(found.dtype).tiny)
    ulp = torch.finfo(found.dtype).eps * scale
    return {
        "unit": "ulps",
        "error": error / ulp,
        "torch_error": torch_error / ulp,
        "allowed": 2 * torch_error / ulp + 1,
        "relative_error": error / scale,
        "torch_relative_error": torch_error / scale,
    }


def _greatest(result: Tensor, exact: Tensor) -> float:
    return (result.double() - exact.double()).abs().max().item()


def _outputs(function: Callable, inputs: tuple) -> tuple[Tensor, ...]:
    results = function(*inputs)
    return results if isinstance(results, tuple) else (results,)


def _results(outputs: tuple[Tensor, ...], gradients: list[Tensor], inputs: tuple, formula: Formula) -> list[Tensor]:
    """``outputs``, and the gradients of ``inputs`` under ``gradients`` of the outputs."""
    if not gradients:
        return list(outputs)
    wanted = [inputs[i] for i in formula.differentiable.values()]
    given = [gradient.to(out.dtype) for gradient, out in zip(gradients, outputs, strict=True)]
    return [*(out.detach() for out in outputs), *torch.autograd.grad(outputs, wanted, given)]


def _double(value: object) -> object:
    if isinstance(value, torch.dtype):
        return torch.float64
    if isinstance(value, Tensor) and (value.is_floating_point() or value.dtype == torch.uint8):
        return value.detach().double().requires_grad_(value.requires_grad)
    return value


def _name(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype, str(dtype).removeprefix("torch."))


def table(section: dict) -> list[list[str]]:
    """The section's table; shapes are in it if there are several."""
    has_shapes = len({r["shape"] for r in section["rows"]}) > 1
    lines = [
        [
            *["shape"][:has_shapes],
            "op",
            "tensor",
            "inputs",
            "dtype",
            "backend",
            "error",
            "torch's own",
            "allowed",
            "",
            "relative",
            "torch's own",
        ]
    ]
    for r in section["rows"]:
        relative = [f"{r[name]:.1e}" if name in r else "" for name in ("relative_error", "torch_relative_error")]
        lines.append([*[r["shape"]][:has_shapes], r["op"], r["tensor"], r["inputs"], r["dtype"], r["backend"],
                      *(f"{r[name]:.2f}" for name in ("error", "torch_error", "allowed")), r["unit"], *relative])  # fmt: skip
    return lines
