"""``fastmae doctor`` on one machine: versions, devices, and which kernels and attention are used and why not faster ones."""

import importlib.metadata
import platform
import resource
import shutil
import sys
from pathlib import Path

import torch
import triton

import fastmae
from fastmae.cores import usable_cores
from fastmae.kernels import dispatch, gather_patches
from fastmae.model.attention.dot_product import MEASURED, attention_shapes, resolve
from fastmae.model.attention.probe import notes, probe, why_not
from fastmae.model.block.choice import block_shapes, residual_of
from fastmae.model.block.measured import BlockTask, known_block
from fastmae.model.config import BACKENDS, kept_patches, preset
from fastmae.train.distributed.launcher import default_workers, read_launcher

SHARED = 8 << 30  # bytes of /dev/shm that a node's streams and collectives can fill
FILES = 4096  # open files that let a reader keep a thousand shards open
_PACKAGES = ("torch", "triton", "numpy", "xformers", "webdataset", "fsspec", "simplejpeg", "pillow", "safetensors", "xxhash",
             "tyro", "tqdm", "matplotlib", "jinja2")  # fmt: skip
_OPTIONAL = {"tensorboard": "a run's TensorBoard log"}


def report() -> list[str]:
    """The lines that ``fastmae doctor`` prints."""
    has_gpu = torch.cuda.is_available()
    device = "cuda" if has_gpu else "cpu"
    dtype = torch.bfloat16 if has_gpu else torch.float32
    attention = _attention(device, dtype)  # first: a separate process probes it, and this one's use of the GPU may exclude that
    return [
        f"fastmae {fastmae.__version__}, Python {sys.version.split()[0]}, {platform.system()} {platform.machine()}",
        *_packages(),
        *_devices(has_gpu),
        *_loading(),
        *_kernels(device),
        *attention,
        *_blocks(device, dtype),
    ]


def _packages() -> list[str]:
    lines = ["packages:"]
    for name in (*_PACKAGES, *_OPTIONAL):
        optional = f" (optional: {_OPTIONAL[name]})" if name in _OPTIONAL else ""
        try:
            lines.append(f"  {name} {importlib.metadata.version(name)}{optional}")
        except importlib.metadata.PackageNotFoundError:
            lines.append(f"  {name} missing: pip install {name}{optional}")
    return lines


def _devices(has_gpu: bool) -> list[str]:
    cores = usable_cores()
    lines = ["devices:", f"  cpu: {cores} cores, torch uses {torch.get_num_threads()} threads"]
    if not has_gpu:
        reason = "this torch is a CPU build" if torch.version.cuda is None else "torch sees no device: is the driver loaded?"
        return [*lines, f"  no CUDA device: {reason}"]
    for i in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(i)
        lines.append(f"  cuda:{i}: {found.name}, sm_{found.major}{found.minor}, {found.total_memory / 2**30:.0f} GiB")
    return lines


def _loading() -> list[str]:
    """Resources of the machine that loader processes need, and which are too small."""
    cores = usable_cores()
    shared = shutil.disk_usage("/dev/shm") if Path("/dev/shm").is_dir() else None
    lines = ["loading data:"]
    if shared is None:
        lines.append("  /dev/shm: missing; indexed shards do not need it, streams and NCCL do: mount a tmpfs there")
    else:
        short = shared.free < SHARED
        advice = (
            f"; short for streams and NCCL, give it {SHARED >> 30} GiB (docker: --shm-size {SHARED >> 30}g)" if short else ""
        )
        lines.append(f"  /dev/shm: {shared.free / 2**30:.1f} of {shared.total / 2**30:.1f} GiB free{advice}")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    short = f"; too few to keep many shards open: ulimit -n {min(hard, FILES)}" if soft < FILES else ""
    lines.append(f"  open files: {soft} a process, {hard} at most{short}")
    info = read_launcher()
    ranks = info.local_size if info.launcher != "none" and info.local_size else max(1, torch.cuda.device_count())
    threads = torch.get_num_threads()
    workers = default_workers(ranks)
    lines.append(f"  processes: {cores} cores, training processes: {ranks}, --workers {workers} by default")
    if ranks * threads > cores and ranks > 1:
        each = max(1, cores // ranks)
        lines.append(f"  threads: {ranks} ranks x {threads} torch threads on {cores} cores: set OMP_NUM_THREADS={each}")
    return lines


def _kernels(device: str) -> list[str]:
    chosen = dispatch.mode()
    head = f"kernels: FASTMAE_KERNELS={chosen}"
    if chosen == "torch":
        return [f"{head}, plain torch everywhere; unset it for Triton on CUDA"]
    if device == "cpu" and not dispatch.INTERPRETED:
        why = "Triton needs a CUDA device" if chosen == "auto" else "which fails on CPU tensors; unset it"
        return [f"{head}, plain torch here: {why}"]
    images = torch.rand(1, 3, 32, 32, device=device)
    try:
        gather_patches(images, torch.zeros(1, 1, dtype=torch.int32, device=device), 16)
    except Exception as error:  # a probe: whatever a compiler or driver raises is the reason
        return [f"{head}, Triton {triton.__version__} does not work here: {type(error).__name__}: {error}"]
    return [f"{head}, Triton {triton.__version__} works{' in the interpreter' if dispatch.INTERPRETED else ''}"]


def _attention(device: str, dtype: torch.dtype) -> list[str]:
    lines = [f"attention ({device}, {dtype}):"]
    shapes = list(dict.fromkeys(attention_shapes(preset("base"), 49, 147) + attention_shapes(preset("huge"), 64, 192)))
    probe(device, dtype, shapes)
    for shape in shapes:
        lines.append(f"  {shape}: auto uses {resolve('auto', device, dtype, shape)}")
    for backend in BACKENDS:
        found = (why_not(backend, device, dtype, shape) for shape in shapes)
        reasons = {reason.partition(" with inputs")[0] for reason in found if reason}  # followed by pages of shapes
        lines.append(f"  {backend}: {'; '.join(sorted(reasons)) or 'works'}")
    return lines + [f"  {note}" for note in notes()]


def _blocks(device: str, dtype: torch.dtype) -> list[str]:
    """What is known of fused blocks. Nothing is measured, which takes minutes."""
    if device not in MEASURED:
        return [f"blocks ({device}): torch's own operations; fused ones are measured on {' and '.join(MEASURED)} alone"]
    lines = [f"blocks ({device}, {dtype}, residual stream fp32):"]
    for name in ("base", "huge"):
        config = preset(name)
        K = kept_patches(config.patches, 0.75)
        for shape in block_shapes(config, K, config.patches - K):
            known = known_block(BlockTask(device, dtype, residual_of(config, dtype), shape, config.attention))
            uses = f"auto uses {known}" if known else "not measured yet, which the first run of such a model does"
            lines.append(f"  {shape}: {uses}{', nothing fused' if known and not known.fused else ''}")
    return lines
