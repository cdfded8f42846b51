"""Compile every kernel ahead of time, without a GPU, and read what the binary needs: registers, stack, shared memory.

A stack means spilled registers; shared memory above 48 KiB would not launch everywhere. ``kernels --resources`` prints the
table and holds it against its limits; ``benchmarks/results/resources.json`` is the committed one, which a test compares with.
"""

import json
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastmae.kernels.decoder_input import _BWD_ROWS, _TILE, _decoder_input_bwd_kernel, _decoder_input_fwd_kernel
from fastmae.kernels.dispatch import warps
from fastmae.kernels.masked_mse import EPS, _masked_mse_bwd_kernel, _masked_mse_fwd_kernel
from fastmae.kernels.patches import _gather_patches_fwd_kernel
from fastmae.kernels.philox import MASKS
from fastmae.kernels.random_masking import _INDEX_BITS, _random_masking_kernel
from fastmae.kernels.resized_crop import _TILE as _CROP_TILE
from fastmae.kernels.resized_crop import _resized_crop_kernel
from fastmae.kernels.take_rows import _sum_holes_kernel, _take_rows_fwd_kernel

TARGETS = (80, 90, 100)  # A100, H100 and H200, B200
MOST_REGISTERS, MOST_SHARED = 128, 48 * 1024  # per thread; bytes per program
TABLE = Path(__file__).parent / "results" / "resources.json"

_STRIDES = {"stride_b": "i64", "stride_c": "i32", "stride_y": "i32", "stride_x": "i32"}


@dataclass(frozen=True)
class Variant:
    """A kernel with the types and constants of one use of it."""

    name: str
    kernel: triton.JITFunction
    types: dict[str, str]
    constants: dict[str, int | float | bool]
    warps: int | None = None
    """Of a program, where they do not follow from the values that it holds."""


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
    """Every kernel at the sizes and types it is used at, from the smallest to patches of 64 x 64 pixels."""
    found = []
    for channels, patch in ((1, 4), (3, 16), (3, 14), (13, 16), (3, 64)):
        found += _patch_variants(channels, patch, "*u8", "*bf16", norm_pix=True)
    found += _patch_variants(3, 16, "*fp32", "*fp32", norm_pix=True)
    found += _patch_variants(3, 16, "*bf16", "*bf16", norm_pix=False)
    found += _patch_variants(3, 14, "*fp16", "*fp16", norm_pix=False)
    for width, dtype, has_fill in ((768, "*bf16", True), (512, "*fp32", True), (1280, "*fp32", False), (192, "*fp16", False)):
        found.append(
            Variant(
                f"take_rows D{width} {dtype[1:]}{' fill' if has_fill else ''}",
                _take_rows_fwd_kernel,
                {"out_ptr": dtype, "x_ptr": dtype, "ids_ptr": "*i32", "fill_ptr": dtype, "N": "i32", "M": "i32", "D": "i32"},
                {"HAS_FILL": has_fill, "BLOCK_D": triton.next_power_of_2(width)},
            )
        )
    for dtype in ("*bf16", "*fp32"):
        types = {"partial_ptr": "*fp32", "grad_ptr": dtype, "ids_ptr": "*i32", "N": "i32", "D": "i32"}
        found.append(Variant(f"sum_holes {dtype[1:]}", _sum_holes_kernel, types, {"M": 196, "BLOCK_D": 128}))
    for width, x, out in ((512, "*bf16", "*fp32"), (512, "*bf16", "*bf16"), (512, "*fp32", "*fp32"), (256, "*fp16", "*fp32")):
        found += _decoder_variants(width, x, out)
    found += [_masking_variant(patches) for patches in (16, 196, 256, 1024, 2048)]
    found += [_crop_variant(channels, has_ids) for channels in (1, 3, 13) for has_ids in (False, True)]
    return found


def _decoder_variants(width: int, x: str, out: str) -> list[Variant]:
    """The decoder's input and its gradient at one width and pair of dtypes."""
    block, tag = triton.next_power_of_2(width), f"D{width} {x[1:]} {out[1:]}"
    sizes = {"K": "i32", "Q": "i32", "D": "i32"}
    return [
        Variant(
            f"decoder_input forward {tag}",
            _decoder_input_fwd_kernel,
            {"out_ptr": out, "x_ptr": x, "token_ptr": "*fp32", "positions_ptr": "*fp32", "keep_ptr": "*i32",
             "predict_ptr": "*i32", **sizes},
            {"BLOCK_M": max(1, _TILE // block), "BLOCK_D": block},
        ),
        Variant(
            f"decoder_input backward {tag}",
            _decoder_input_bwd_kernel,
            {"grad_x_ptr": x, "partial_ptr": "*fp32", "grad_ptr": out, "rows": "i32", "D": "i32"},
            {"M": 197, "BLOCK_M": _BWD_ROWS, "BLOCK_D": min(128, block)},
        ),
    ]  # fmt: skip


def _masking_variant(patches: int) -> Variant:
    types = {"keep_ptr": "*i32", "predict_ptr": "*i32", "restore_ptr": "*i32", "epochs_ptr": "*i64", "samples_ptr": "*i64",
             "seed": "i64", "L": "i32", "K": "i32", "Q": "i32"}  # fmt: skip
    block = triton.next_power_of_2(patches)
    constants = {"STREAM": MASKS, "INDEX_BITS": _INDEX_BITS, "BLOCK_L": block}
    return Variant(f"random_masking L{patches}", _random_masking_kernel, types, constants)


def _crop_variant(channels: int, has_ids: bool) -> Variant:
    """Crops, whole or patches of them."""
    sizes = ("K", "columns", "h", "w", "cell_h", "cell_w")
    types = {"out_ptr": "*u8", "pixels_ptr": "*u8", "offsets_ptr": "*i64", "widths_ptr": "*i32", "boxes_ptr": "*i32",
             "flips_ptr": "*u8", "ids_ptr": "*i32", **dict.fromkeys(sizes, "i32")}  # fmt: skip
    constants = {"C": channels, "HAS_IDS": has_ids, "BLOCK": _CROP_TILE}
    return Variant(f"resized_crop C{channels}{' patches' if has_ids else ''}", _resized_crop_kernel, types, constants, warps=1)


def _patch_variants(channels: int, patch: int, pixels: str, compute: str, norm_pix: bool) -> list[Variant]:
    """The kernels that read patches of images, for one kind of image and one compute dtype."""
    block = triton.next_power_of_2(channels * patch * patch)
    tag = f"C{channels} p{patch} {pixels[1:]} {compute[1:]}{'' if norm_pix else ' plain'}"
    images = {"images_ptr": pixels, "ids_ptr": "*i32"}
    statistics = {"mean_ptr": "*fp32", "std_ptr": "*fp32"}
    rows = {"center_ptr": "*fp32", "rstd_ptr": "*fp32"}
    constants = {"C": channels, "PATCH": patch, "IS_BYTES": pixels == "*u8", "BLOCK_P": block}
    return [
        Variant(
            f"gather_patches {tag}",
            _gather_patches_fwd_kernel,
            {"out_ptr": compute, **images, **statistics, "K": "i32", "columns": "i32", **_STRIDES},
            constants,
        ),
        Variant(
            f"masked_mse forward {tag}",
            _masked_mse_fwd_kernel,
            {"rows_ptr": "*fp32", **rows, "pred_ptr": compute, **images, **statistics,
             "Q": "i32", "columns": "i32", **_STRIDES},
            {"EPS": EPS, "NORM_PIX": norm_pix, **constants},
        ),
        Variant(
            f"masked_mse backward {tag}",
            _masked_mse_bwd_kernel,
            {"grad_pred_ptr": compute, "grad_rows_ptr": "*fp32", "pred_ptr": compute, **images, **rows, **statistics,
             "Q": "i32", "columns": "i32", **_STRIDES},
            constants,
        ),
    ]  # fmt: skip


def resources(variant: Variant, target: int) -> Resources:
    """Compile ``variant`` for compute capability ``target`` (80 is 8.0) and read its needs off the binary."""
    signature = {**variant.types, **dict.fromkeys(variant.constants, "constexpr")}
    source = ASTSource(variant.kernel, signature, variant.constants)
    # Kernels that hold a whole patch or all keys of an image get more warps for more values, the others Triton's default.
    block = variant.constants.get("BLOCK_P", 2 * variant.constants.get("BLOCK_L", 0))
    options = {"num_warps": variant.warps or warps(block)}
    compiled = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"{word}:(\d+)", text)[1]) for word in ("REG", "STACK"))
    return Resources(registers, stack, compiled.metadata.shared)


def measure(targets: tuple[int, ...] = TARGETS) -> dict[str, object]:
    """Every variant on every target: plain JSON, with the version of Triton that compiled it."""
    rows = {}
    for variant in variants():
        rows[variant.name] = {f"sm_{target}": vars(resources(variant, target)) for target in targets}
    return {"triton": triton.__version__, "kernels": rows}


def exceeded(found: dict) -> list[str]:
    """A line for each binary that needs more than the limits."""
    return [
        f"{name} on {target} needs {needs}"
        for name, row in found["kernels"].items()
        for target, needs in row.items()
        if needs["stack"] or needs["shared"] > MOST_SHARED or needs["registers"] > MOST_REGISTERS
    ]


def to_json(found: dict) -> str:
    """``found`` with one line a kernel, so that a change shows as the lines that changed."""
    rows = ",\n".join(f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in found["kernels"].items())
    return f'{{"triton": {json.dumps(found["triton"])}, "kernels": {{\n{rows}\n}}}}\n'


def table(found: dict) -> list[list[str]]:
    """Registers, stack bytes and shared bytes of each kernel on each target, for people."""
    lines = [["kernel", *(f"sm_{t}: regs / stack / shared" for t in TARGETS)]]
    for name, row in found["kernels"].items():
        lines.append([name, *(f"{n['registers']} / {n['stack']} / {n['shared']}" for n in row.values())])
    return lines
