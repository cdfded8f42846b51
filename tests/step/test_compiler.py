"""A machine without a C or C++ compiler: a run that must compile says so in one line, and one that need not continues."""

import re
import subprocess

import pytest
import torch
from torch._inductor import config as inductor
from torch._inductor.exc import CppCompileError, InductorError
from triton.runtime.build import _build

from fastmae.errors import InputError
from fastmae.train.distributed.world import World
from fastmae.train.pretrain.pretrain import pretrain
from fastmae.train.step import parallelize as parallel
from fastmae.train.step.compiler import advise_off, compiler_error, first_step, lacking
from tests.support.runs import RECIPE, losses, run_of

GPU, CPU = World(0, 1, torch.device("cuda", 0)), World(3, 8, torch.device("cpu"))


@pytest.fixture
def without_compiler(tmp_path, monkeypatch):
    """No compiler is found, and nothing that was compiled before."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    monkeypatch.setenv("CXX", str(tmp_path / "c++"))
    torch._dynamo.reset()
    with inductor.patch({"cpp.cxx": (str(tmp_path / "c++"),)}):
        yield tmp_path / "c++"
    torch.compiler.set_stance("default")
    torch._dynamo.reset()


def build(monkeypatch, **environment):
    """What Triton's own build of a launcher raises."""
    for name in ("CC", "PATH"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(Exception) as raised:
        _build("launcher", "launcher.c", "/nowhere", [], [], [], [])
    return raised.value


def test_a_run_that_must_compile_and_cannot_ends_with_one_line(without_compiler, shard_folder, tmp_path):
    with pytest.raises(InputError) as raised:
        pretrain(RECIPE, run_of(shard_folder, tmp_path / "run", compile="blocks"))
    assert str(raised.value) == (
        f"torch.compile needs a compiler, and no C++ compiler works here (CXX={without_compiler}): apt-get install g++, or "
        "name one in CXX; --compile off does without, slower"
    )


def test_a_run_that_may_compile_goes_on_without_and_says_so_once(without_compiler, shard_folder, tmp_path, monkeypatch, capsys):
    compiled, whole = parallel.compiled, run_of(shard_folder, tmp_path / "whole")
    pretrain(RECIPE, whole)
    # As auto means on a GPU.
    monkeypatch.setattr(parallel, "compiled", lambda module, how, *rest: compiled(module, "blocks", *rest))
    capsys.readouterr()
    pretrain(RECIPE, run_of(shard_folder, tmp_path / "run"))
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(
        r"fastmae: continues without torch\.compile, slower: no C\+\+ compiler works here \(CXX=.*apt-get install", line
    )


def test_what_lacks_is_named_with_how_to_get_it(monkeypatch):
    assert lacking(build(monkeypatch, PATH="/nowhere")) == (
        "no C compiler is here (looked for gcc and clang): apt-get install gcc, or name one in CC"
    )
    missing = build(monkeypatch, CC="/nowhere/mycc")
    assert lacking(missing).startswith("the compiler /nowhere/mycc cannot be run, No such file or directory: apt-get install")
    assert lacking(build(monkeypatch, CC="/etc/passwd")).startswith("the compiler /etc/passwd cannot be run, Permission denied")
    failing = build(monkeypatch, CC="/bin/false")
    assert isinstance(failing, subprocess.CalledProcessError) and "apt-get install python3-dev" in lacking(failing)
    assert "(CC=/bin/false)" in lacking(RuntimeError("in a subprocess:\nRuntimeError: Failed to find C compiler. Please ..."))
    header = CppCompileError(["g++", "x.cpp"], "x.cpp:1:10: fatal error: Python.h: No such file or directory")
    assert lacking(InductorError(header, None)) == "the C++ compiler does not find Python.h: apt-get install python3-dev"


@pytest.mark.parametrize(
    "error",
    [
        CppCompileError(["g++", "x.cpp"], "x.cpp:1:10: error: expected ';'"),
        FileNotFoundError(2, "No such file or directory", "/data/shard-000000.tar"),
        subprocess.CalledProcessError(1, ["nvidia-smi"]),
        subprocess.CalledProcessError(-2, ["gcc", "x.c"]),  # Ctrl-C
        RuntimeError("CUDA error: an illegal memory access was encountered"),
    ],
)
def test_other_errors_are_not_taken_for_it(error):
    assert lacking(error) is None and compiler_error(error, run_of("s", "o", compile="blocks"), CPU) is None


@pytest.mark.parametrize(
    ("world", "how", "kernels", "says"),
    [
        (
            GPU,
            "auto",
            "auto",
            "Triton needs a compiler, and no C compiler is here .*; --compile off and FASTMAE_KERNELS=torch",
        ),
        (GPU, "off", "auto", "Triton needs .* CC; FASTMAE_KERNELS=torch in the environment does without, slower$"),
        (GPU, "model", "torch", "Triton needs .*; --compile off does without, slower$"),
        (CPU, "blocks", "auto", "^rank 3: torch.compile needs .*; --compile off does without, slower$"),
        (GPU, "off", "torch", "or name one in CC$"),
    ],
)
def test_what_does_without_fits_the_run(world, how, kernels, says, monkeypatch):
    """fastmae's own kernels need a C compiler as well."""
    monkeypatch.setenv("FASTMAE_KERNELS", kernels)
    error = RuntimeError("Failed to find C compiler. Please specify via CC environment variable")
    assert re.search(says, str(compiler_error(error, run_of("s", "o", compile=how), world)))


class Kernel:
    """A step whose own Triton kernels cannot be launched, compiled or not."""

    def __init__(self):
        self.calls, self.optimizer = 0, torch.optim.SGD([torch.zeros(1)])

    def __call__(self, *_):
        self.calls += 1
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable")


@pytest.mark.parametrize(("how", "calls"), [("auto", 2), ("blocks", 1), ("off", 1)])
def test_only_auto_is_tried_again(how, calls, capsys):
    step = Kernel()
    try:
        with pytest.raises(RuntimeError, match="Failed to find C compiler"):
            first_step(step, [], 0.0, world=World(0, 1, torch.device("cpu")), how=how)
    finally:
        torch.compiler.set_stance("default")
    assert step.calls == calls and len(capsys.readouterr().err.splitlines()) == calls - 1


def test_other_faults_of_a_compiler_keep_their_traceback_behind_a_line(capsys):
    fault = InductorError(AssertionError("a pass is wrong"), None)
    advise_off(fault, run_of("s", "o", compile="model"))
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        "fastmae: torch.compile has failed, InductorError: AssertionError: a pass is wrong; --compile off trains without it; "
        "its traceback:"
    )
    advise_off(fault, run_of("s", "o", compile="off"))
    advise_off(TypeError("a fault of ours"), run_of("s", "o", compile="model"))
    assert capsys.readouterr().err == ""
