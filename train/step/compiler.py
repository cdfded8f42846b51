"""The C or C++ compiler that torch.compile and Triton call, and what a run does on a machine that has none.

Inductor builds C++ on CPUs, Triton a small C launcher for GPUs. What they have built before lies in their caches and needs no
compiler, so none is looked for beforehand: the first step shows.
"""

import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch

from fastmae.errors import InputError, chain
from fastmae.kernels import dispatch
from fastmae.train.config.run import Run
from fastmae.train.console import report
from fastmae.train.distributed.world import World
from fastmae.train.step.step import MicroBatch, Step, StepResult

_NO_C = "Failed to find C compiler"  # Triton
_NO_CXX = re.compile(r"No working C\+\+ compiler found|Compiler: \S+ is not found")  # Inductor
_NO_HEADER = re.compile(r"fatal error: (\S+): No such file or directory")
_PROGRAMS = ("cc", "gcc", "clang", "c++", "g++", "clang++")


def lacking(error: BaseException) -> str | None:
    """What ``error`` lacks of a compiler, and how to get it; None if that is not what it lacks."""
    for e in chain(error):
        text = str(e)
        if _NO_CXX.search(text):
            return f"no C++ compiler works here ({_named('CXX', 'g++')}): apt-get install g++, or name one in CXX"
        if _NO_C in text:
            return f"no C compiler is here ({_named('CC', 'gcc and clang')}): apt-get install gcc, or name one in CC"
        if isinstance(e, FileNotFoundError | PermissionError) and _is_compiler(e.filename):
            return f"the compiler {e.filename} cannot be run, {e.strerror}: apt-get install g++, or name another in CC and CXX"
        if type(e).__name__ == "CppCompileError" and (header := _NO_HEADER.search(text)):
            return f"the C++ compiler does not find {header[1]}: apt-get install {_package(header[1])}"
        # One that a signal has ended, by Ctrl-C or for want of memory, is there and works.
        failed = isinstance(e, subprocess.CalledProcessError) and e.returncode > 0
        if failed and isinstance(e.cmd, list) and _is_compiler(e.cmd[0]):
            return f"the C compiler {e.cmd[0]} fails, see its own message; Python.h comes with apt-get install python3-dev"
    return None


def compiler_error(error: BaseException, run: Run, world: World) -> InputError | None:
    """The error to raise for ``error`` if a compiler is lacking, with what does without one; else None."""
    if (what := lacking(error)) is None:
        return None
    switches = ["--compile off"] if run.compile != "off" else []
    if world.device.type == "cuda" and dispatch.mode() != "torch":
        switches.append("FASTMAE_KERNELS=torch in the environment")
    user = "Triton" if world.device.type == "cuda" else "torch.compile"
    who = f"rank {world.rank}: " if world.size > 1 else ""
    without = f"; {' and '.join(switches)} does without, slower" if switches else ""
    return InputError(f"{who}{user} needs a compiler, and {what}{without}")


def first_step(step: Step, batches: Sequence[MicroBatch], lr: float, *, world: World, how: str) -> StepResult:
    """The first step of a rank, in which everything is compiled. ``how``: ``Run.compile``; with ``auto`` a run that lacks a
    compiler continues without torch.compile, with a message."""

    def work() -> StepResult:
        if world.size > 1:
            step.warm_up(batches[0])
        return step(batches, lr)

    try:
        return work()
    except Exception as error:
        if how != "auto" or (what := lacking(error)) is None:
            raise
    who = f"rank {world.rank}: " if world.size > 1 else ""
    report(f"{who}continues without torch.compile, slower: {what}")
    torch.compiler.set_stance("force_eager")  # for good: what was compiled is called as it was written
    step.optimizer.zero_grad(set_to_none=True)
    return work()


def advise_off(error: BaseException, run: Run) -> None:
    """Say before the traceback of a compiler's own fault what does without it."""
    modules = {type(e).__module__ for e in chain(error)}
    if run.compile != "off" and any(m.startswith(("torch._dynamo", "torch._inductor", "triton.compiler")) for m in modules):
        reason = str(error).partition("\n")[0]
        report(f"torch.compile has failed, {type(error).__name__}: {reason}; --compile off trains without it; its traceback:")


def _named(variable: str, otherwise: str) -> str:
    return f"{variable}={os.environ[variable]}" if os.environ.get(variable) else f"looked for {otherwise}"


def _is_compiler(program: object) -> bool:
    named = [os.environ.get(variable) for variable in ("CC", "CXX")]
    return isinstance(program, str) and (program in named or Path(program).name in _PROGRAMS)


def _package(header: str) -> str:
    return "python3-dev" if header == "Python.h" else "libgomp1 gcc" if header == "omp.h" else "g++"
