"""A process of its own for each contender, that runs steps when asked: so that none affects another."""

import multiprocessing
import re
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from fastmae.benchmarks.machine import lacks_memory
from fastmae.benchmarks.timing import Times, interleave, seconds_per_call
from fastmae.benchmarks.training.contenders import Contender
from fastmae.benchmarks.training.kinds import profile_calls
from fastmae.errors import InputError


class OutOfMemory(Exception):
    """The contender does not fit."""


class Worker:
    """Builds a contender in a new process, on ``device``; ``build`` must be picklable. Use as a context manager.

    Every method raises OutOfMemory if it does not fit, InputError if what it was built from is wrong, else RuntimeError.
    """

    def __init__(self, build: Callable[[], Contender], device: torch.device):
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, build, device, torch.get_num_threads()), daemon=True)
        self._process.start()
        theirs.close()
        self._asked: tuple | None = None  # the question already sent

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_) -> None:
        self._pipe.close()
        self._process.join(10)
        if self._process.is_alive():
            self._process.kill()

    def description(self) -> str:
        """What it is."""
        return self._ask("description")

    def losses(self, seed: int) -> tuple[float, float]:
        """Losses of four images under the noise of ``seed`` in float32, and of the batch by what is timed, as it is timed."""
        return self._ask("losses", seed)

    def ask_losses(self, seed: int) -> None:
        """Start to compute ``losses(seed)`` without waiting."""
        if self._asked != (question := ("losses", seed)):
            self._send(question)
            self._asked = question

    def seconds(self, calls: int) -> float:
        """Mean seconds of one of ``calls`` steps."""
        return self._ask("seconds", calls)

    def peak_memory(self) -> int:
        """Peak bytes of a step: allocated on the GPU, or resident memory of the process on a CPU."""
        return self._ask("peak_memory")

    def profile(self, calls: int) -> dict[str, object]:
        """Where the device's time of a step goes, by kind of kernel: ``kinds.profile_calls``."""
        return self._ask("profile", calls)

    def _ask(self, *question):
        if self._asked != question:
            self._send(question)
        self._asked = None
        try:
            kind, answer = self._pipe.recv()
        except (EOFError, OSError) as error:
            raise self._gone() from error
        if kind == "answer":
            return answer
        raise {"memory": OutOfMemory, "input": InputError}.get(kind, RuntimeError)(answer)

    def _send(self, question: tuple) -> None:
        try:
            self._pipe.send(question)
        except OSError as error:
            raise self._gone() from error

    def _gone(self) -> Exception:
        self._process.join(10)
        if self._process.exitcode == -9:  # by the kernel, usually out of memory
            return OutOfMemory("the process was killed")
        return RuntimeError(f"a benchmark's process ended with code {self._process.exitcode}")


def losses_of(workers: dict[str, Worker], seed: int) -> dict[str, tuple[float, float]]:
    """``Worker.losses`` of each. All compile at the same time, which may take each a minute; what then does not fit beside
    the others is asked again when they have freed their caches."""
    for worker in workers.values():
        worker.ask_losses(seed)
    found, full = {}, []
    for name, worker in workers.items():
        try:
            found[name] = worker.losses(seed)
        except OutOfMemory:
            full.append(name)
    found |= {name: workers[name].losses(seed) for name in full}
    return {name: found[name] for name in workers}


def take_turns(workers: dict[str, Worker], device: torch.device, rounds: int) -> dict[str, Times]:
    """The times of ``workers``, interleaved: on a GPU five steps a turn, after enough warm-up for compilers and graphs."""
    calls, warm_up = (5, 6) if device.type == "cuda" else (1, 1)
    return interleave({name: w.seconds for name, w in workers.items()}, rounds=rounds, calls=calls, warm_up=warm_up)


def _serve(pipe: Connection, build: Callable[[], Contender], device: torch.device, threads: int) -> None:
    torch.set_num_threads(threads)
    contender: Contender | None = None
    while True:
        try:
            question, *arguments = pipe.recv()
        except EOFError:  # the benchmark is done
            return
        try:
            contender = contender or build()
            answer = ("answer", _ANSWERS[question](contender, device, *arguments))
        except InputError as error:
            answer = ("input", str(error))
        except Exception as error:  # sent to the process that asked
            text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            is_full = lacks_memory(error)
            answer = ("memory", "out of memory") if is_full else ("failed", text)
            if not is_full:
                traceback.print_exc()
        if device.type == "cuda":
            torch.cuda.empty_cache()  # leaves room for the others, whose turn it is
        pipe.send(answer)


def _losses(contender: Contender, device: torch.device, seed: int) -> tuple[float, float]:
    # With gradients, as in training: a compiled graph without them is another one.
    timed = contender.timed_loss().item()
    # Convolutions on a GPU would round to TF32, which is none of what is compared.
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        return contender.loss(contender.images, seed).item(), timed


def _seconds(contender: Contender, device: torch.device, calls: int) -> float:
    if device.type == "cuda":
        contender.step()  # takes memory back, untimed
    return seconds_per_call(contender.step, device, calls)


def _peak_memory(contender: Contender, device: torch.device) -> int:
    if device.type == "cuda":
        # Of a step in steady state: what tuning and compiling took at first is not what training needs. A replayed graph
        # allocates nothing any more: its memory is what stays reserved when the cache is empty.
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        contender.step()
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        return max(torch.cuda.max_memory_allocated(device), torch.cuda.memory_reserved(device))
    contender.step()
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


_ANSWERS = {
    "description": lambda contender, device: contender.description,
    "losses": _losses,
    "seconds": _seconds,
    "peak_memory": _peak_memory,
    "profile": lambda contender, device, calls: profile_calls(contender.step, device, calls),
}
