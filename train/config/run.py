"""Where a run reads and writes, and how fast it goes: what a recipe does not say."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, get_args, get_origin

import tyro
from tyro.constructors import PrimitiveConstructorSpec

from fastmae.errors import InputError
from fastmae.files import open_home
from fastmae.train.config.modes import COMPILE, PARALLEL, PRECISION, REDUCE, Compile, Parallel, Precision, Reduce


def optional(kind: type, metavar: str, default: str) -> type:
    """``kind`` or None, where ``--help`` shows ``default``: what None stands for."""
    shown = tyro.conf.arg(metavar=metavar, help_behavior_hint=f"(default: {default})")
    return Annotated[(kind | None, shown, *([one_of(get_args(kind))] if get_origin(kind) is Literal else []))]


def one_of(choices: tuple[str, ...]) -> PrimitiveConstructorSpec:
    """How one of ``choices``, or None if none is given, is parsed. Tyro's own way lists None as a choice, in no fixed order."""
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=f"{{{','.join(choices)}}}",
        instance_from_str=lambda given: given[0],
        is_instance=lambda value: value is None or value in choices,
        str_from_instance=lambda value: [str(value)],
        choices=choices,
    )


@dataclass(frozen=True, kw_only=True)
class Run:
    """Where a run reads and writes, and how fast it goes. Of these only ``precision``, ``compile`` and ``crop``
    touch the result, by rounding."""

    data: str
    """A folder of shards, or paths or URLs of tars with {000..999} in them."""
    stage: optional(Path, "PATH", "read where it is") = None
    """Folder on each machine's own disk that indexed shards are copied to before they are read: once per machine, hashes
    checked; complete copies are used again."""
    out: Path
    """Folder of checkpoints and logs; a run that is there already is resumed."""
    batch_size: int = 64
    """Images per process and micro-batch."""
    workers: optional(int, "INT", "the cores that node or container may use / its training processes - 1") = None
    """Loader processes per training process; 0 loads in the training process."""
    prefetch: int = 4
    """Batches prepared ahead of the step."""
    crop: Literal["auto", "cpu", "device"] = "auto"
    """Where random crops are resized; auto: on the device if it is a GPU. The two differ by rounding."""
    bad_budget: float = 0.001
    """Share of the data set's samples (streams: of those seen) that may be bad, and replaced, before the run stops; 16 always
    may."""
    allow_pipe: bool = False
    """Let ``pipe:`` URLs run their shell commands."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU if there is one."""
    precision: Precision = "auto"
    """bf16 or fp16 (autocast, fp32 weights and residual stream; fp16 with a dynamic loss scale), fp32, or auto: bf16 on GPUs,
    fp32 on the CPU."""
    parallel: Parallel = "ddp"
    """How processes share the model: ddp (each holds the full model), fsdp (sharded over all of them), or hsdp (sharded within
    a node, replicated over nodes)."""
    reduce: Reduce = "fp32"
    """The dtype in which gradients are reduced between processes; bf16 is half the bytes."""
    compile: Compile = "auto"
    """torch.compile of the full model, of single blocks (compiled in seconds), off, or auto: off on the CPU, model on one GPU,
    blocks on several."""
    cuda_graphs: bool = False
    """Record the whole step once and replay it: no launches, for small batches on one GPU."""
    resume: str = "auto"
    """auto: the newest complete checkpoint in ``out``, if any; PATH: a checkpoint, or the newest of a run, or an older one
    beside it if it is damaged; exact:PATH: that checkpoint or none."""
    log_every: int = 20
    """Steps between two measurements."""
    save_every: int = 500
    """Steps between two checkpoints; the last step always makes one."""
    keep: int = 3
    """Newest checkpoints to keep."""
    keep_every: optional(int, "INT", "none of them") = None
    """Checkpoints of every so many steps are kept for good."""
    async_save: bool = True
    """Write checkpoints while training continues."""
    draw_every: int | None = 5000
    """Steps between two pictures of what the model reconstructs; the last step draws too. None: no pictures."""
    requeue_exit: bool = False
    """After a signal exit with code 85, by which a cluster's script knows that the run is to be resumed."""
    first_timeout: float = 1800.0
    """Seconds that the start, the first step and a save may take."""
    timeout: float = 300.0
    """Seconds that any later step may take before stacks are written and the run ends."""
    max_skips: int = 20
    """Consecutive updates skipped, for gradients that are not finite or loss spikes, before the run is called diverged."""
    spike_z: float = 8.0
    """Robust z-score from which on a loss is called a spike, and logged."""
    skip_spikes: bool = False
    """Skip the updates of loss spikes; decided on the device, in each step."""
    check_replicas: optional(int, "INT", "never") = None
    """Steps between two comparisons of the weights of all processes, bit for bit."""
    wandb: optional(str, "STR", "no log there") = None
    """A Weights & Biases project to log to as well."""

    def __post_init__(self):
        for name in ("out", "stage"):
            if (path := getattr(self, name)) is not None:
                object.__setattr__(self, name, open_home(path))
        prefix = "exact:" * self.resume.startswith("exact:")
        for name, before in (("data", ""), ("resume", prefix)):
            path = getattr(self, name).removeprefix(before)
            if path.startswith("~"):
                object.__setattr__(self, name, f"{before}{open_home(Path(path))}")
        counts = ("batch_size", "log_every", "save_every", "keep", "keep_every", "draw_every", "max_skips", "check_replicas")
        for name in counts:
            if (value := getattr(self, name)) is not None and value < 1:
                raise InputError(f"{name.replace('_', '-')} must be at least 1, got {value}")
        for name in ("first_timeout", "timeout", "spike_z"):
            if not 0 < getattr(self, name) < float("inf"):
                raise InputError(f"{name.replace('_', '-')} must be a positive number, got {getattr(self, name)}")
        for name, words in (("parallel", PARALLEL), ("reduce", REDUCE), ("precision", PRECISION)):
            if getattr(self, name) not in words:
                raise InputError(f"{name} must be one of {', '.join(words)}, got {getattr(self, name)!r}")
        if self.compile not in COMPILE:
            raise InputError(f"compile must be one of {', '.join(COMPILE)}, got {self.compile!r}")


def accumulation(effective_batch: int, batch_size: int, processes: int) -> int:
    """Micro-batches per step. Raises InputError unless they make up the effective batch exactly."""
    count, rest = divmod(effective_batch, batch_size * processes)
    if rest or not count:
        raise InputError(
            f"effective batch {effective_batch} must be a multiple of {batch_size} per process x {processes} processes = "
            f"{batch_size * processes}; change --batch-size or --effective-batch"
        )
    return count
