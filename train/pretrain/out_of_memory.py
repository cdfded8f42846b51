"""Out of memory: recognised whatever raised it, and put into one line that names settings that need less.

On a GPU torch's allocator raises OutOfMemoryError, compiled code wraps it, and cuBLAS, cuDNN and NCCL have messages of their
own; on a CPU so have torch, oneDNN, C++ and numpy; a loader's worker sends its traceback. The kernel's own out-of-memory
killer sends SIGKILL, which no process can report.
"""

import errno
import re
import resource

from fastmae.errors import CheckpointError, DivergedError, InputError, RequeueError, chain
from fastmae.host_memory import available_memory
from fastmae.train.config.recipes import Recipe
from fastmae.train.config.run import Run
from fastmae.train.distributed.world import World
from fastmae.train.units import format_bytes

_GPU = re.compile(r"CUDA out of memory|CUDA error: out of memory|Cuda failure.{0,9}out of memory|CU\w+_ALLOC_FAILED", re.I)
_CPU = re.compile(
    r"can't allocate memory|not enough memory|cannot allocate memory|bad_alloc|could not create a memory object|MemoryError",
    re.I,
)
_EXPLAINED = (InputError, DivergedError, CheckpointError, RequeueError)  # which state their reason already
_OF_BATCH = ("reading data", "in a step", "drawing")  # what needs less with a smaller batch
_WORKER = re.compile(r"worker process failed|DataLoader worker process")  # of our pool, of torch's
_ASKED = re.compile(r"tried to allocate ([\d.]+ [KMGTPE]iB|\d+ bytes)|Unable to allocate ([\d.]+ [KMGTPE]iB)", re.I)
_CAPACITY = re.compile(r"total capacity of ([\d.]+ [KMGTPE]iB) of which ([\d.]+ [KMGTPE]iB|\d+ bytes) is free")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error``, or its cause, is that memory could not be had."""
    return (
        isinstance(error, Exception)
        and not isinstance(error, _EXPLAINED)
        and any(
            isinstance(e, MemoryError)
            or (isinstance(e, OSError) and e.errno == errno.ENOMEM)
            or (isinstance(e, RuntimeError) and bool(_GPU.search(str(e)) or _CPU.search(str(e))))
            for e in chain(error)
        )
    )


def out_of_memory(error: BaseException, recipe: Recipe, run: Run, world: World, doing: str) -> InputError | None:
    """The error to raise for ``error``, raised while ``doing``; None if it is none of memory."""
    if not is_out_of_memory(error):
        return None
    text = "\n".join(str(e) for e in chain(error))
    who = f"rank {world.rank}: " if world.size > 1 else ""
    if _WORKER.search(text) and run.workers:
        return InputError(f"{who}out of memory in a loader worker{_figures(text)}: {_less_loading(recipe, run, world)}")
    head = f"{who}out of memory on {world.device if _GPU.search(text) else 'the CPU'}, {doing}{_figures(text)}"
    if doing == "starting":
        return InputError(f"{head}: the model, its gradients and moments do not fit; {_smaller_model(run, world)}")
    if doing not in _OF_BATCH and not _GPU.search(text):  # a checkpoint's copy, staging: whatever the batch
        fewer = f", or --workers {run.workers // 2} instead of {run.workers}" if (run.workers or 0) > 1 else ""
        return InputError(f"{head}: give the job more memory{fewer}")
    pictures = " --draw-every None draws no pictures;" if doing == "drawing" else ""
    return InputError(f"{head}:{pictures} {_smaller_batch(recipe, run, world)}")


def smaller_batch(effective_batch: int, batch_size: int, processes: int) -> int | None:
    """The largest batch, at most half of ``batch_size``, of which the effective batch is a multiple; None if there is none."""
    return next((b for b in range(batch_size // 2, 0, -1) if effective_batch % (b * processes) == 0), None)


def _smaller_batch(recipe: Recipe, run: Run, world: World) -> str:
    """Flags with which a step needs less."""
    size = smaller_batch(recipe.effective_batch, run.batch_size, world.size)
    ways = []
    if size is not None:
        micro = recipe.effective_batch // (size * world.size)
        rounding = " --reduce fp32" if run.reduce == "bf16" and run.parallel != "ddp" else ""  # which forbids accumulation
        ways.append(
            f"--batch-size {size} --effective-batch {recipe.effective_batch}{rounding} makes the same updates, each of {micro} "
            "accumulated micro-batches"
        )
    if not recipe.model.checkpointing:
        ways.append("--checkpointing keeps fewer activations")
    if not ways:
        ways.append(_smaller_model(run, world))
    return f"--batch-size {run.batch_size} does not fit; " + ", or ".join(ways)


def _smaller_model(run: Run, world: World) -> str:
    if run.parallel == "ddp" and world.size > 1:
        return "--parallel fsdp shards them over the ranks"
    return "choose a smaller model, a device with more memory, or more ranks with --parallel fsdp"


def _less_loading(recipe: Recipe, run: Run, world: World) -> str:
    ways = [f"--workers {run.workers // 2} instead of {run.workers}"] if run.workers > 1 else []
    ways += [f"--prefetch {run.prefetch // 2} instead of {run.prefetch}"] if run.prefetch > 1 else []
    return ", ".join([*ways, _smaller_batch(recipe, run, world)])


def _figures(text: str) -> str:
    """Bytes asked for, free and there at all, as far as they are known."""
    asked = _ASKED.search(text)
    amount = next((found for found in asked.groups() if found), "") if asked else ""
    if amount.endswith("bytes"):
        amount = format_bytes(int(amount.split()[0]))
    if capacity := _CAPACITY.search(text):
        room = f"{capacity[2]} of {capacity[1]} free"
    else:
        room = "" if _GPU.search(text) else _host_room()
    return "".join(f", {part}" for part in (amount and f"asked for {amount}", room) if part)


def _host_room() -> str:
    """What this process may have of the host's memory."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        return f"a process may have {format_bytes(limit)} (ulimit -v)"
    available = available_memory()
    return "" if available is None else f"{format_bytes(available)} available"
