"""Compile every kernel ahead of time, without a GPU, and read what the binary needs: registers, stack, shared memory.

A stack means spilled registers; shared memory above 48 KB would not launch everywhere.
"""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastmae.kernels.masked_mse import EPS, _masked_mse_bwd_kernel, _masked_mse_fwd_kernel
from fastmae.kernels.patches import _gather_patches_fwd_kernel
from fastmae.kernels.take_rows import _sum_holes_kernel, _take_rows_fwd_kernel

TARGETS = (80, 90, 100)  # A100, H100 and H200, B200

_STRIDES = {"stride_b": "i64", "stride_c": "i32", "stride_y": "i32", "stride_x": "i32"}


@dataclass(frozen=True)
class Variant:
    """A kernel with the types and constants of one use of it."""

    name: str
    kernel: triton.JITFunction
    types: dict[str, str]
    constants: dict[str, int | float | bool]


@dataclass(frozen=True)
class Resources:
    """What one binary needs of a multiprocessor."""

    registers: int
    """Per thread."""
    stack: int
    """Bytes per thread; 0 unless registers spill."""
    shared: int
    """Bytes per program."""


def variants() -> list[Variant]:
    """Every kernel at the sizes of ViT-B/16 and ViT-H/14, from uint8 and from float32 images."""
    found = []
    for patch, width in ((16, 768), (14, 1280)):
        block = triton.next_power_of_2(3 * patch * patch)
        for pixels, is_bytes in (("*u8", True), ("*fp32", False)):
            tag = f"p{patch} {pixels[1:]}"
            statistics = {"mean_ptr": "*fp32", "std_ptr": "*fp32"}
            found += [
                Variant(
                    f"gather_patches {tag}",
                    _gather_patches_fwd_kernel,
                    {"out_ptr": "*bf16", "images_ptr": pixels, "ids_ptr": "*i32", **statistics,
                     "K": "i32", "columns": "i32", **_STRIDES},
                    {"C": 3, "PATCH": patch, "IS_BYTES": is_bytes, "BLOCK_P": block},
                ),
                Variant(
                    f"masked_mse forward {tag}",
                    _masked_mse_fwd_kernel,
                    {"rows_ptr": "*fp32", "center_ptr": "*fp32", "rstd_ptr": "*fp32", "pred_ptr": "*bf16", "images_ptr": pixels,
                     "ids_ptr": "*i32", **statistics, "Q": "i32", "columns": "i32", **_STRIDES},
                    {"EPS": EPS, "C": 3, "PATCH": patch, "NORM_PIX": True, "IS_BYTES": is_bytes, "BLOCK_P": block},
                ),
                Variant(
                    f"masked_mse backward {tag}",
                    _masked_mse_bwd_kernel,
                    {"grad_pred_ptr": "*bf16", "grad_rows_ptr": "*fp32", "pred_ptr": "*bf16", "images_ptr": pixels,
                     "ids_ptr": "*i32", "center_ptr": "*fp32", "rstd_ptr": "*fp32", **statistics,
                     "Q": "i32", "columns": "i32", **_STRIDES},
                    {"C": 3, "PATCH": patch, "IS_BYTES": is_bytes, "BLOCK_P": block},
                ),
            ]  # fmt: skip
        for dtype in ("*bf16", "*fp32"):
            found.append(
                Variant(
                    f"take_rows D{width} {dtype[1:]}",
                    _take_rows_fwd_kernel,
                    {
                        "out_ptr": dtype,
                        "x_ptr": dtype,
                        "ids_ptr": "*i32",
                        "fill_ptr": dtype,
                        "N": "i32",
                        "M": "i32",
                        "D": "i32",
                    },
                    {"HAS_FILL": True, "BLOCK_D": triton.next_power_of_2(width)},
                )
            )
    found.append(
        Variant(
            "sum_holes",
            _sum_holes_kernel,
            {"partial_ptr": "*fp32", "grad_ptr": "*bf16", "ids_ptr": "*i32", "N": "i32", "M": "i32", "D": "i32"},
            {"BLOCK_D": 128},
        )
    )
    return found


def resources(variant: Variant, target: int) -> Resources:
    """Compile ``variant`` for compute capability ``target`` (80 is 8.0) and read its needs off the binary."""
    signature = {**variant.types, **dict.fromkeys(variant.constants, "constexpr")}
    source = ASTSource(variant.kernel, signature, variant.constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", target, 32))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"{word}:(\d+)", text)[1]) for word in ("REG", "STACK"))
    return Resources(registers, stack, compiled.metadata.shared)
