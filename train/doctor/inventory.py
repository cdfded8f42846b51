"""What each process of a run has: its GPU, the versions of what it runs, the limits of its machine."""

import contextlib
import importlib.metadata
import os
import platform
import re
import resource
import shutil
import socket
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import numpy
import torch
import triton
import xxhash

import fastmae
import fastmae.train
from fastmae.cores import usable_cores
from fastmae.kernels import dispatch
from fastmae.train.distributed.world import World

_VARIABLES = ("NCCL_", "TORCH_NCCL_", "GLOO_", "FASTMAE_", "PYTORCH_", "OMP_NUM_THREADS", "TORCHINDUCTOR_", "TRITON_")
_ANSWER = 10.0  # seconds for nvidia-smi, which hangs if the driver is broken


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """The GPU of a process."""

    index: int
    """Among the visible GPUs of the process."""
    name: str
    total: int
    """Bytes of memory."""
    free: int
    """Bytes that are not in use."""
    uuid: str
    modes: str
    """MIG, ECC and compute mode as nvidia-smi gives them; empty where it does not answer."""


@dataclass(frozen=True, kw_only=True)
class Inventory:
    """What one process has."""

    rank: int
    local_rank: int
    host: str
    gpu: Gpu | None
    """None on the CPU."""
    gpu_error: str | None = None
    """Why the process has no GPU although one is asked for."""
    versions: dict[str, str] = field(default_factory=dict)
    shared: tuple[int, int] | None = None
    """Bytes of /dev/shm, free and total; None where there is none."""
    files: tuple[int, int] = (0, 0)
    """Limits of open files, soft and hard."""
    cores: int = 0
    variables: dict[str, str] = field(default_factory=dict)
    """Environment variables that affect communication and kernels."""


def take_inventory(world: World, device: str) -> Inventory:
    """Of this process. ``device``: auto, cpu or cuda, as in a run."""
    on_gpu = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    gpu, wrong = _gpu(world) if on_gpu else (None, None)
    shared = shutil.disk_usage("/dev/shm") if Path("/dev/shm").is_dir() else None
    return Inventory(
        rank=world.rank,
        local_rank=world.local_rank,
        host=socket.gethostname(),
        gpu=gpu,
        gpu_error=wrong,
        versions=versions(),
        shared=shared and (shared.free, shared.total),
        files=resource.getrlimit(resource.RLIMIT_NOFILE),
        cores=usable_cores(),
        variables={name: value for name, value in os.environ.items() if name.startswith(_VARIABLES)},
    )


def machines_of(everyone: list[Inventory]) -> list[list[Inventory]]:
    """The processes of each machine: those of one host, unless local ranks repeat, as in containers that share one."""
    machines: list[list[Inventory]] = []
    for one in everyone:
        found = (m for m in machines if m[0].host == one.host and one.local_rank not in {other.local_rank for other in m})
        machine = next(found, None)
        if machine is None:
            machines.append([one])
        else:
            machine.append(one)
    return machines


def versions() -> dict[str, str]:
    """Of everything whose version may change what a process computes or sends."""
    found = {
        "fastmae": f"{fastmae.__version__}, sources {_sources()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "numpy": numpy.__version__,
        "cuda": str(torch.version.cuda),
    }
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        found["xformers"] = importlib.metadata.version("xformers")
    if torch.version.cuda is not None:
        with contextlib.suppress(RuntimeError, AttributeError, ImportError):
            found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
        with contextlib.suppress(RuntimeError):  # of a library that does not match this torch
            found["cudnn"] = str(torch.backends.cudnn.version())
    with contextlib.suppress(OSError):
        driver = re.search(r"\d+\.\d+[.\d]*", Path("/proc/driver/nvidia/version").read_text())
        found |= {"driver": driver[0]} if driver else {}
    return found


def _sources() -> str:
    """A hash of fastmae's own files: two checkouts of one version may differ."""
    state = xxhash.xxh3_64()
    for folder in (Path(module.__file__).parent for module in (fastmae, dispatch, fastmae.train)):
        for path in sorted(folder.rglob("*.py")):
            state.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return state.hexdigest()[:8]


def _gpu(world: World) -> tuple[Gpu | None, str | None]:
    """The GPU of this process, or why there is none."""
    visible = torch.cuda.device_count()
    if not visible:
        reason = "a CPU build of torch" if torch.version.cuda is None else "is the driver loaded, CUDA_VISIBLE_DEVICES right?"
        return None, f"torch sees no CUDA device ({reason})"
    index = 0 if visible == 1 else world.local_rank  # a launcher may make one GPU visible to each process
    if index >= visible:
        return None, f"process {world.local_rank} of its machine sees {visible} GPUs; start fewer processes there"
    try:
        found = torch.cuda.get_device_properties(index)
        torch.cuda.empty_cache()  # memory that this process still caches is not another's
        free, total = torch.cuda.mem_get_info(index)
    except RuntimeError as error:
        return None, f"its GPU {index} does not answer: {str(error).partition(chr(10))[0]}"
    uuid = str(getattr(found, "uuid", ""))
    return Gpu(index=index, name=found.name, total=total, free=free, uuid=uuid, modes=_modes(uuid)), None


def _modes(uuid: str) -> str:
    command = ["nvidia-smi", f"--id=GPU-{uuid}", "--query-gpu=mig.mode.current,ecc.mode.current,compute_mode",
               "--format=csv,noheader"]  # fmt: skip
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_ANSWER, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    mig, ecc, compute = (word.strip() for word in (done.stdout.strip().split(",") + ["?"] * 3)[:3])
    return f"MIG {mig}, ECC {ecc}, compute mode {compute}"
