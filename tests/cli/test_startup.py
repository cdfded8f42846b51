"""What a start costs: nothing of torch before arguments are parsed or a name is used, and little besides it afterwards."""

import ast
import inspect
import os
import statistics
import subprocess
import sys

import pytest

import fastmae
from fastmae.benchmarks.arguments import parser
from fastmae.train.cli.main import COMMANDS, SHARDS

HEAVY = ("torch", "triton", "xformers", "safetensors", "webdataset", "PIL")
EVERY_NAME = "import fastmae\nfor name in fastmae.__all__: getattr(fastmae, name)"
BENCH = next(action.choices for action in parser()._actions if action.choices)
MODULES = ("fastmae.train", "fastmae.benchmarks", "fastmae.train.launch", "fastmae.train.launch.submit")
PAGES = [
    *(("fastmae.train", *words) for words in [(), *((c,) for c in COMMANDS)]),
    *(("fastmae.train", "shards", name) for name in SHARDS),
    *(("fastmae.train", "bench", name) for name in BENCH),
    *((module,) for module in MODULES[1:]),
]


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_a_name_of_fastmae_is_imported_when_it_is_used():
    code = f"""import sys, fastmae
fastmae.ModelConfig(), fastmae.InputError, fastmae.DivergedError, fastmae.DataError
assert set(fastmae.__all__) <= set(dir(fastmae))
print([m for m in {HEAVY} if m in sys.modules])
fastmae.random_masking, fastmae.load_model
assert fastmae.model.config.ModelConfig is fastmae.ModelConfig and fastmae.kernels.take_rows
print("torch" in sys.modules)"""
    assert python(code).splitlines() == ["[]", "True"]


def test_a_name_that_fastmae_does_not_have_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'fastmae' has no attribute 'mae_vit_giant'"):
        fastmae.mae_vit_giant  # noqa: B018


def test_type_checkers_see_the_names_that_programs_see():
    block = next(node for node in ast.parse(inspect.getsource(fastmae)).body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in block.body for alias in node.names}
    assert sorted(seen) == sorted(fastmae.__all__)
    assert all(getattr(fastmae, name).__module__ == file for name, file in seen.items())


def test_no_help_imports_torch():
    """All of them in one process; those of `fastmae bench` as the program that it starts."""
    code = f"""import contextlib, io, sys
from fastmae.benchmarks.cli import main as bench
from fastmae.train.cli.main import main
from fastmae.train.launch.__main__ import main as launch
from fastmae.train.launch.submit import main as submit
for module, *words in {PAGES}:
    run = dict(zip({MODULES}, (main, bench, launch, submit)))[module]
    run, words = (bench, words[1:]) if words[:1] == ["bench"] else (run, words)
    page = io.StringIO()
    with contextlib.redirect_stdout(page), contextlib.suppress(SystemExit):
        run([*words, "--help"])
    assert "usage" in page.getvalue().lower(), (module, words)
    assert not [m for m in {HEAVY} if m in sys.modules], (module, words)
print("done")"""
    assert python(code) == "done"


def test_benchmarks_need_torch_triton_and_numpy_only():
    """`make gpu` installs nothing. Those that read data need its packages."""
    packages = ("tyro", "tqdm", "PIL", "matplotlib", "jinja2", "safetensors", "simplejpeg", "webdataset", "xxhash")
    modules = ("cli", "training.step", "training.worker", "training.waterfall", "training.gradients", "kernels.speed",
               "kernels.attention", "kernels.check", "kernels.resources", "scaling.model", "scaling.page",
               "traffic.predict", "traffic.page")  # fmt: skip
    code = f"""import importlib, sys
sys.modules.update(dict.fromkeys({packages}))
for name in {modules}: importlib.import_module(f"fastmae.benchmarks.{{name}}")
print("done")"""
    assert python(code) == "done"


def test_a_wrong_choice_of_kernels_is_one_line_of_benchmarks_too():
    command = [sys.executable, "-m", "fastmae.benchmarks", "readme"]
    done = subprocess.run(command, env={**os.environ, "FASTMAE_KERNELS": "cuda"}, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "fastmae bench: FASTMAE_KERNELS must be one of auto, triton, torch, got 'cuda'\n"


def cpu_seconds(*arguments: str) -> float:
    """Of a Python process and its children, user and system."""
    process = os.posix_spawn(sys.executable, [sys.executable, *arguments], os.environ,
                             file_actions=[(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)])  # fmt: skip
    _, status, used = os.wait4(process, 0)
    assert os.waitstatus_to_exitcode(status) == 0, arguments
    return used.ru_utime + used.ru_stime


@pytest.mark.timing
def test_fastmae_with_every_name_costs_half_a_second_beyond_torch():
    rounds = [(cpu_seconds("-c", "import torch"), cpu_seconds("-c", EVERY_NAME)) for _ in range(5)]
    torch, all_names = (statistics.median(times) for times in zip(*rounds, strict=True))
    assert all_names - torch < 0.5, rounds


@pytest.mark.timing
def test_every_help_costs_less_than_a_second():
    rounds = [{words: cpu_seconds("-m", *words, "--help") for words in PAGES} for _ in range(3)]
    slow = {words: found for words in PAGES if not (found := statistics.median(r[words] for r in rounds)) < 1.0}
    assert not slow
