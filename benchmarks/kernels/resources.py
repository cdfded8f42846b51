"""Compile every kernel as it is launched, without a GPU, and read what the binary needs: registers, stack, shared memory.

A stack means spilled registers; shared memory above 48 KiB would not launch everywhere, and above 128 registers few threads are
left to hide memory behind: from these and the launch's warps follows the predicted occupancy. Attention may have 255 registers:
its products keep their sums in them, and have tens of operations for each byte. ``kernels --resources`` prints the table
and checks its limits; ``benchmarks/results/resources.json`` is the committed one, which a test compares with the code.
"""

import json
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import triton

from fastmae.benchmarks.kernels.launches import Launch, launches
from fastmae.benchmarks.kernels.occupancy import occupancy
from fastmae.benchmarks.kernels.uses import cases
from fastmae.benchmarks.report import align

TARGETS = (80, 90, 100)  # A100, H100 and H200, B200
MOST_REGISTERS, MOST_SHARED = 128, 48 * 1024  # per thread; bytes per program
MOST_OF_ATTENTION = 255  # registers
TABLE = Path(__file__).parents[1] / "results" / "resources.json"


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


def measure(targets: tuple[int, ...] = TARGETS, rare: bool = True) -> dict[str, object]:
    """Every launch of every case (``uses.cases``) on every target: plain JSON, with the version of Triton that compiled it."""
    rows: dict[str, dict[str, dict[str, int]]] = {}
    known: dict[str, Resources] = {}
    for case, call in cases(rare):
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
    print(
        "\n".join(wrong)
        or "every kernel is within its limits: no stack; 48 KiB of shared memory; 128 registers, or 255 of attention"
    )
    print(json.dumps(found))
    return 1 if wrong else 0


def exceeded(found: dict) -> list[str]:
    """A line for each binary that needs more than the limits."""
    return [
        f"{name} on {target} needs {needs}"
        for name, row in found["kernels"].items()
        for target, needs in row.items()
        if needs["stack"] or needs["shared"] > MOST_SHARED or needs["registers"] > _most_registers(name)
    ]


def _most_registers(name: str) -> int:
    return MOST_OF_ATTENTION if name.startswith("short_attention") else MOST_REGISTERS


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
