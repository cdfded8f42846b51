"""What a measurement was made on, and this machine's own ceilings, measured in the same run."""

import datetime
import importlib.metadata
import platform
import re
import subprocess
import sys
from pathlib import Path

import torch
import triton

import fastmae
from fastmae.benchmarks.timing import device_seconds
from fastmae.cores import usable_cores
from fastmae.devices import device_name


def environment(device: torch.device) -> dict[str, object]:
    """Hardware, versions and command of this run, as plain JSON; no names of hosts or paths."""
    found: dict[str, object] = {
        "device": device_name(device),
        "command": " ".join(["python -m fastmae.benchmarks", *(_plain(a) for a in sys.argv[1:])]),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "fastmae": fastmae.__version__,
        "commit": _commit(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "xformers": _version("xformers"),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        memory = round(properties.total_memory / 2**30)
        found |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(), "memory_gib": memory}
    return found


def matmul_flops(device: torch.device) -> float:
    """FLOP/s of a large matrix product here and now: bf16 on a GPU, float32 on a CPU."""
    n, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (2048, torch.float32)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / device_seconds([lambda: a @ b], device)


def copy_bytes(device: torch.device) -> float:
    """Bytes per second, read and written, of copying a large tensor here and now."""
    n = 2**30 if device.type == "cuda" else 2**28
    source, target = (torch.empty(n, dtype=torch.uint8, device=device) for _ in range(2))
    source.fill_(1)
    return 2 * n / device_seconds([lambda: target.copy_(source)], device)


def lacks_memory(error: Exception) -> bool:
    """Whether ``error`` is of memory that was not there: torch's, or a library's below it, which have messages of their own."""
    return bool(re.search("OutOfMemory|out of memory|ALLOC_FAILED|can't allocate memory", f"{type(error).__name__}: {error}"))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The checkout's commit, with a + if files differ from it; None outside a checkout."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    try:
        run = {"cwd": root, "capture_output": True, "text": True, "check": True}
        commit = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], **run).stdout.strip()
        changed = subprocess.run(["git", "status", "--porcelain", "--untracked-files=no"], **run).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+" if changed else "")


def _plain(argument: str) -> str:
    return Path(argument).name if "/" in argument else argument
