"""Compile every kernel as it is launched, without a GPU, and read what the binary needs: registers, stack, shared memory.

A stack means spilled registers; shared memory above 48 KiB would not launch everywhere. From these and the launch's warps
follows the predicted occupancy. ``kernels --resources`` prints the table and checks its limits;
``benchmarks/results/resources.json`` is the committed one, which a test compares with the code.
"""

import json
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import triton
from torch import Tensor

from fastmae import kernels
from fastmae.benchmarks.kernels.launches import Launch, launches
from fastmae.benchmarks.kernels.occupancy import occupancy
from fastmae.benchmarks.report import align
from fastmae.model.config import preset
from fastmae.model.mae import MAE
from fastmae.model.masking import random_masking

TARGETS = (80, 90, 100)  # A100, H100 and H200, B200
MOST_REGISTERS, MOST_SHARED = 128, 48 * 1024  # per thread; bytes per program
TABLE = Path(__file__).parents[1] / "results" / "resources.json"

_B, _L, _K = 2, 196, 49  # images; patches, visible ones: of a training step of ViT-B
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "uint8": torch.uint8}

Case = tuple[str, Callable[[], object]]
"""What the use of an op is called in the table, and the call, forward and backward."""


@dataclass(frozen=True)
class Resources:
    """What one binary needs of a multiprocessor."""

    registers: int
    """Per thread."""
    stack: int
    """Bytes per thread; 0 unless registers spill."""
    shared: int
    """Bytes per program."""
    occupancy: float
    """Predicted: resident warps over a multiprocessor's most, 0 to 1."""


def cases() -> Iterator[Case]:
    """Every op as it is used, from training steps and the loader to rare sizes and types."""
    for model, layout, residual in (("base", "NCHW", "fp32"), ("base", "NHWC", "bf16"), ("huge", "NCHW", "fp32")):
        yield _step(model, layout, residual)
    for patches in (196, 256, 1024, 2048):
        yield _masks(patches)
    for channels in (3, 13):
        yield from _crops(channels)
    for channels, patch, side in ((1, 4, 28), (13, 16, 224), (3, 14, 98), (3, 64, 256)):
        yield _patches(channels, patch, side, "uint8", "bf16", norm_pix=True)
    yield _patches(3, 16, 224, "fp32", "fp32", norm_pix=True)
    yield _patches(3, 16, 224, "bf16", "bf16", norm_pix=False)
    yield _patches(3, 14, 224, "fp16", "fp16", norm_pix=False)
    for width, dtype, has_fill in ((768, "bf16", True), (512, "fp32", True), (1280, "fp32", False), (192, "fp16", False)):
        yield _rows(width, dtype, has_fill)
    for width, dtype, out in ((512, "bf16", "bf16"), (512, "fp32", "fp32"), (256, "fp16", "fp32")):
        yield _sequence(width, dtype, out)
    for width in (192, 256, 384, 512, 768, 1024, 1280, 4096):
        yield _norm(width, "fp32", "bf16")
    for width, residual, branch in ((512, "bf16", "bf16"), (768, "bf16", "bf16"), (1280, "bf16", "bf16"), (768, "fp32", "fp16"),
                                    (768, "fp32", None)):  # fmt: skip
        yield _norm(width, residual, branch)
    for width, dtype in ((768, "bf16"), (2048, "bf16"), (3072, "bf16"), (5120, "fp16"), (3072, "fp32")):
        yield _gelu(width, dtype)
    yield _ones()


def _step(model: str, layout: str, residual: str) -> Case:
    """A training step under autocast: every op by the model itself. One block of each kind, for blocks launch nothing here."""
    config = preset(model, norm_pix_loss=True, depth=1, decoder_depth=1, residual=residual)
    memory_format = torch.channels_last if layout == "NHWC" else torch.contiguous_format  # as crops of the CPU, of the GPU
    images = _images(config.in_chans, config.img_size[0], "uint8").contiguous(memory_format=memory_format)
    net, masking = MAE(config), random_masking(_B, config.patches, 0.75, seed=0)

    def call() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = net.training_loss(images, masking)
        loss.backward()

    return f"step {model} {layout} residual {residual}", call


def _masks(patches: int) -> Case:
    epochs, kept = torch.zeros(_B, dtype=torch.int64), patches // 4
    return f"L{patches}", partial(kernels.random_masking, 0, epochs, torch.arange(_B), patches, kept, patches - kept)


def _crops(channels: int) -> Iterator[Case]:
    """Crops as the loader makes them."""
    side = 224
    pixels = torch.zeros(_B * 256 * 256 * channels, dtype=torch.uint8)
    boxes = torch.tensor([[0, 0, 200, 180]] * _B, dtype=torch.int32)
    images = (pixels, torch.arange(_B) * 256 * 256 * channels, torch.full((_B,), 256).int(), boxes, torch.arange(_B) > 0)
    yield f"C{channels}", partial(kernels.resized_crop, *images, (side, side), channels)


def _patches(channels: int, patch: int, side: int, pixels: str, compute: str, *, norm_pix: bool) -> Case:
    """Both ops that read patches of images, of ``side`` pixels."""
    images, ids = _images(channels, side, pixels), torch.zeros(_B, 3, dtype=torch.int32)
    statistics = (torch.zeros(channels), torch.ones(channels)) if pixels == "uint8" else (None, None)
    pred = torch.zeros(_B, 3, channels * patch**2, dtype=_DTYPES[compute], requires_grad=True)

    def call() -> None:
        kernels.gather_patches(images, ids, patch, *statistics, _DTYPES[compute])
        kernels.masked_mse(pred, images, ids, patch, norm_pix, *statistics).backward()

    return f"C{channels} p{patch} {side} px {pixels} {compute}{'' if norm_pix else ' plain'}", call


def _rows(width: int, dtype: str, has_fill: bool) -> Case:
    """The shuffle or, with a mask token to fill holes with, the unshuffle."""
    ids_keep, ids_restore = torch.zeros(_B, _K, dtype=torch.int32), torch.zeros(_B, _L, dtype=torch.int32)
    x = torch.zeros(_B, _K if has_fill else _L, width, dtype=_DTYPES[dtype], requires_grad=True)
    fill = torch.zeros(width, dtype=_DTYPES[dtype], requires_grad=True) if has_fill else None
    ids = (ids_restore, ids_keep) if has_fill else (ids_keep, ids_restore)

    def call() -> None:
        kernels.take_rows(x, *ids, fill).sum().backward()

    return f"D{width} {dtype}{' fill' if has_fill else ''}", call


def _sequence(width: int, dtype: str, out: str) -> Case:
    """The decoder's input at one width and pair of dtypes."""
    x = torch.zeros(_B, 1 + _K, width, dtype=_DTYPES[dtype], requires_grad=True)
    token, positions = torch.zeros(width, requires_grad=True), torch.zeros(1 + _L, width)
    ids_keep, ids_predict = torch.zeros(_B, _K, dtype=torch.int32), torch.zeros(_B, _L - _K, dtype=torch.int32)

    def call() -> None:
        kernels.decoder_input(x, token, positions, ids_keep, ids_predict, _DTYPES[out]).sum().backward()

    return f"D{width} {dtype} {out}", call


def _norm(width: int, residual: str, branch: str | None) -> Case:
    """A residual addition and the norm after it, or a norm alone, in the dtypes of the stream and of the branch."""
    x = torch.zeros(_B, 1 + _K, width, dtype=_DTYPES[residual], requires_grad=True)
    added = None if branch is None else torch.zeros_like(x, dtype=_DTYPES[branch]).requires_grad_()
    weight, bias, branch_bias = torch.zeros(3, width, requires_grad=True).unbind(0)

    def call() -> None:
        total, normed = kernels.add_norm(
            x, added, weight, bias, 1e-6, None if added is None else branch_bias, _DTYPES[branch or "bf16"]
        )
        (total.sum() + normed.sum()).backward()

    return f"D{width} {residual} {branch or 'alone'}", call


def _gelu(width: int, dtype: str) -> Case:
    x = torch.zeros(_B, 1 + _K, width, dtype=_DTYPES[dtype], requires_grad=True)
    bias = torch.zeros(width, requires_grad=True)
    return f"D{width} {dtype}", lambda: kernels.gelu(x, bias).sum().backward()


def _ones() -> Case:
    """Sizes of 1, which Triton makes constants, in every argument."""
    images, ids, epochs = _images(1, 1, "uint8"), torch.zeros(_B, 1, dtype=torch.int32), torch.zeros(_B, dtype=torch.int64)
    x, token = torch.zeros(_B, 2, 1, requires_grad=True), torch.zeros(1, requires_grad=True)
    crops = (images.flatten(), torch.arange(_B), torch.ones(_B).int(), torch.tensor([[0, 0, 1, 1]] * _B).int(), epochs > 0)

    def call() -> None:
        kernels.random_masking(1, epochs, epochs, 2, 1, 1)
        kernels.resized_crop(*crops, (1, 1), 1)
        kernels.gather_patches(images, ids, 1, *torch.ones(2, 1))
        kernels.masked_mse(x[:, :1], images, ids, 1, False, *torch.ones(2, 1)).backward()
        kernels.take_rows(x[:, :1], ids, ids, token).sum().backward()
        kernels.decoder_input(x, token, torch.zeros(3, 1), ids, ids).sum().backward()
        sum(kernels.add_norm(x[:1, :1], x[:1, 1:], token, token, 1e-6, token)).sum().backward()
        kernels.gelu(x[:1, :1], token).sum().backward()

    return "ones", call


def _images(channels: int, side: int, dtype: str) -> Tensor:
    return torch.zeros(_B, channels, side, side, dtype=_DTYPES[dtype])


def resources(launch: Launch) -> Resources:
    """Compile ``launch`` and read the binary's resources."""
    compiled = launch.compile()
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"{word}:(\d+)", text)[1]) for word in ("REG", "STACK"))
    shared, warps = compiled.metadata.shared, compiled.metadata.num_warps
    return Resources(registers, stack, shared, occupancy(launch.target, registers=registers, shared=shared, warps=warps))


def measure(targets: tuple[int, ...] = TARGETS) -> dict[str, object]:
    """Every launch of every case on every target: plain JSON, with the version of Triton that compiled it."""
    rows: dict[str, dict[str, dict[str, int]]] = {}
    known: dict[str, Resources] = {}
    for case, call in cases():
        for target in targets:
            seen: Counter[str] = Counter()
            for launch in launches(call, target):
                if launch.key not in known:
                    known[launch.key] = resources(launch)
                seen[launch.name] += 1
                again = " in the gradient" if seen[launch.name] > 1 else ""  # take_rows is also its own gradient
                rows.setdefault(f"{launch.name} {case}{again}", {})[f"sm_{target}"] = vars(known[launch.key])
    return {"triton": triton.__version__, "kernels": rows}


def report(*, save: bool) -> int:
    """Measure on all targets, print the table and one JSON line, write ``TABLE`` if asked to; the exit code, 1 if a limit is
    exceeded."""
    found = measure()
    if save:
        TABLE.parent.mkdir(exist_ok=True)
        TABLE.write_text(to_json(found))
    print(align(table(found)))
    wrong = exceeded(found)
    print("\n".join(wrong) or "every kernel is within its limits: no stack, 48 KiB of shared memory, 128 registers")
    print(json.dumps(found))
    return 1 if wrong else 0


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
    """Registers, stack bytes, shared bytes and predicted occupancy of each kernel on each target."""
    lines = [["kernel", *(f"sm_{t}: regs / stack / shared / predicted occupancy" for t in TARGETS)]]
    for name, row in found["kernels"].items():
        needs = (f"{n['registers']} / {n['stack']} / {n['shared']} / {n['occupancy']:.0%}" for n in row.values())
        lines.append([name, *needs])
    return lines
