"""Where a run reads and writes, and how fast it goes: what a recipe does not say."""

import os
from dataclasses import dataclass
from pathlib import Path

from fastmae.errors import InputError
from fastmae.train.step import COMPILE


@dataclass(frozen=True, kw_only=True)
class Run:
    """Where a run reads and writes, and how fast it goes. Of these only ``precision``, ``compile``, ``crop`` and ``decode``
    touch the result, by rounding."""

    data: str
    """A folder of shards, or paths or URLs of tars with {000..999} in them."""
    out: Path
    """Folder of checkpoints and logs; a run that is there already is continued."""
    batch_size: int = 64
    """Images per process and micro-batch."""
    workers: int | None = None
    """Loader processes per training process; 0 loads in the training process. By default this machine's cores, shared among
    its training processes, less one for each of these."""
    prefetch: int = 4
    """Batches prepared ahead of the step."""
    crop: str = "auto"
    """Where random crops are resized: cpu, device, or auto: the device if it is a GPU. They differ by rounding."""
    decode: str = "cpu"
    """Where JPEGs are decoded: cpu, or nvjpeg: the GPU, through torchvision."""
    bad_budget: float = 0.001
    """Share of the data set's samples (streams: of those seen) that may be bad, and replaced, before the run stops; 16 always
    may."""
    allow_pipe: bool = False
    """Let ``pipe:`` URLs run their shell commands."""
    device: str = "auto"
    """auto, cpu or cuda."""
    precision: str = "auto"
    """bf16 (autocast, fp32 weights and residual stream), fp32, or auto: bf16 on GPUs, fp32 on the CPU."""
    compile: str = "auto"
    """torch.compile of the whole model, of single blocks (compiled in seconds), off, or auto: off on the CPU, model on one GPU,
    blocks on several."""
    cuda_graphs: bool = False
    """Record the whole step once and replay it: no launches, for small batches on one GPU."""
    resume: str = "auto"
    """auto: the newest complete checkpoint in ``out``, if any; or the path of one."""
    log_every: int = 20
    """Steps between two measurements."""
    save_every: int = 500
    """Steps between two checkpoints; the last step always makes one."""
    keep: int = 3
    """Newest checkpoints to keep."""

    def __post_init__(self):
        for name in ("batch_size", "log_every", "save_every", "keep"):
            if getattr(self, name) < 1:
                raise InputError(f"{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")
        if self.workers is None:
            object.__setattr__(self, "workers", default_workers())
        if self.precision not in ("auto", "bf16", "fp32"):
            raise InputError(f"precision must be auto, bf16 or fp32, got {self.precision!r}")
        if self.compile not in COMPILE:
            raise InputError(f"compile must be one of {', '.join(COMPILE)}, got {self.compile!r}")


def default_workers(local_ranks: int | None = None) -> int:
    """Loader processes for each of the training processes on this machine, which torchrun tells by default."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if local_ranks is None else local_ranks
    return max(1, len(os.sched_getaffinity(0)) // max(1, ranks) - 1)


def accumulation(effective_batch: int, batch_size: int, processes: int) -> int:
    """Micro-batches per step. Raises InputError unless they make up the effective batch exactly."""
    count, rest = divmod(effective_batch, batch_size * processes)
    if rest or not count:
        raise InputError(
            f"effective batch {effective_batch} must be a multiple of {batch_size} per process x {processes} processes = "
            f"{batch_size * processes}; change --batch-size or --effective-batch"
        )
    return count
