"""What torch.compile has made and the next start takes over: where it lies, whose it is, and what is refused."""

import os
import stat
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastmae.files import cache_folder
from fastmae.train.distributed.world import World
from fastmae.train.pretrain.pretrain import pretrain
from fastmae.train.step import compile_cache
from fastmae.train.step.compile_cache import CompileCache, use_local_folders
from tests.support.runs import RECIPE, records, run_of

CPU = torch.device("cpu")
NAMES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")


@pytest.fixture
def bare(tmp_path, monkeypatch):
    """No variables of caches, and a temporary folder of its own."""
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def test_folders_are_this_user_s_own_and_the_same_for_each_process(bare, monkeypatch):
    folder = use_local_folders(CPU)
    own = bare / f"fastmae-{os.geteuid()}"
    assert folder.parent == own and stat.S_IMODE(own.stat().st_mode) == 0o700
    assert [os.environ[name] for name in NAMES] == [str(folder / "inductor"), str(folder / "triton")]
    for name in NAMES:
        monkeypatch.delenv(name)
    assert use_local_folders(CPU) == folder


def test_variables_that_are_set_stay(bare, monkeypatch):
    monkeypatch.setenv(NAMES[1], "mine")
    folder = use_local_folders(CPU)
    assert os.environ[NAMES[0]].startswith(str(folder)) and os.environ[NAMES[1]] == "mine"
    assert use_local_folders(CPU) is None


@pytest.mark.parametrize("theirs", ["writable by all", "a link", "a file", "another user's"])
def test_a_folder_that_somebody_else_may_have_made_is_not_used(theirs, bare, monkeypatch):
    taken = bare / f"fastmae-{os.geteuid()}"
    if theirs == "a link":
        (bare / "elsewhere").mkdir(mode=0o700)
        taken.symlink_to(bare / "elsewhere")
    elif theirs == "a file":
        taken.touch(mode=0o600)
    else:
        taken.mkdir(mode=0o700)
        taken.chmod(0o777 if theirs == "writable by all" else 0o700)
    if theirs == "another user's":
        monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
        taken.rename(bare / f"fastmae-{os.geteuid()}")
    folder = use_local_folders(CPU)
    assert folder.parent != taken and folder.parent.parent == bare
    assert stat.S_IMODE(folder.parent.stat().st_mode) == 0o700
    assert not list(bare.glob("elsewhere/*"))


def test_no_temporary_folder_leaves_everything_to_torch(bare, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(bare / "nowhere"))
    assert use_local_folders(CPU) is None and not set(NAMES) & set(os.environ)


def test_other_versions_and_other_sources_have_folders_of_their_own(bare, monkeypatch):
    def folder():
        for name in NAMES:
            os.environ.pop(name, None)
        return use_local_folders(CPU)

    found = [folder()]
    monkeypatch.setattr(torch, "__version__", "2.99.0")
    found.append(folder())
    (bare / "package").mkdir()
    (bare / "package" / "op.py").write_text("x = 1")
    monkeypatch.setattr(compile_cache, "dispatch", types.SimpleNamespace(__file__=str(bare / "package" / "op.py")))
    found.append(folder())
    (bare / "package" / "op.py").write_text("x = 2")
    found.append(folder())
    assert len(set(found)) == 4


_NAMELESS = """
import getpass, os, pwd, sys
def nobody(_): raise KeyError("no such user")
pwd.getpwuid = nobody
import torch
from fastmae.files import cache_folder
from fastmae.train.step.compile_cache import use_local_folders
assert cache_folder() is None
os.environ["FASTMAE_CACHE"] = "~/cache"
assert cache_folder() is None
use_local_folders(torch.device("cpu"))
from torch._inductor.runtime.cache_dir_utils import cache_dir
import triton
print(cache_dir(), triton.knobs.cache.dir)
"""


def test_neither_a_home_nor_a_user_name_is_needed(tmp_path):
    unset = ("HOME", "USER", "LOGNAME", "LNAME", "USERNAME", "FASTMAE_CACHE", "XDG_CACHE_HOME", *NAMES)
    environment = {name: value for name, value in os.environ.items() if name not in unset} | {"TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", _NAMELESS], env=environment, cwd=tmp_path, capture_output=True, text=True,
                          check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    inductor, triton = map(Path, done.stdout.split())
    assert inductor.parent == triton.parent and inductor.parent.parent == tmp_path / f"fastmae-{os.geteuid()}"
    assert [p.name for p in tmp_path.iterdir()] == [f"fastmae-{os.geteuid()}"]  # no ~ in the folder it was started in


class Compiler:
    """In the place of torch.compiler: artifacts as their keys, what was loaded, and when."""

    def __init__(self):
        self.made, self.loaded = [], []

    def save_cache_artifacts(self):
        return (" ".join(self.made).encode(), self._info(self.made)) if self.made else None

    def load_cache_artifacts(self, artifacts):
        assert type(artifacts) is bytes
        self.loaded.append(artifacts)
        return self._info(artifacts.decode().split())

    def _info(self, keys):
        return types.SimpleNamespace(artifacts={"inductor": [*keys]})


@pytest.fixture
def compiler(monkeypatch, tmp_path):
    fake = Compiler()
    for name in ("save_cache_artifacts", "load_cache_artifacts"):
        monkeypatch.setattr(torch.compiler, name, getattr(fake, name))
    monkeypatch.setenv("FASTMAE_CACHE", str(tmp_path / "cache"))
    return fake


def open_cache(tmp_path, rank=0, recipe=RECIPE, **flags):
    world = World(rank, 1, CPU)
    return CompileCache(recipe, run_of("shards", tmp_path / "run", **{"compile": "blocks", **flags}), world)


def test_what_one_start_keeps_the_next_one_loads(compiler, tmp_path):
    cache = open_cache(tmp_path)
    assert cache.load() == [] and cache.save() == []
    compiler.made = ["a", "b"]
    assert cache.save() == [f"compiled code is kept for the next start: {cache.path}, 0.0 MB"]
    assert stat.S_IMODE(cache.path.stat().st_mode) == 0o600 and cache.path.parent == tmp_path / "cache" == cache_folder()
    again = open_cache(tmp_path)
    assert again.load() == [f"compiled code of an earlier start: {cache.path}"] and compiler.loaded == [b"a b"]
    written = cache.path.stat().st_mtime_ns
    assert again.save() == [] and cache.path.stat().st_mtime_ns == written  # nothing new
    compiler.made.append("c")
    assert again.save() and again.save() == [] and open_cache(tmp_path).load() and compiler.loaded[-1] == b"a b c"


def test_files_that_no_start_has_read_for_long_are_removed_when_one_is_written(compiler, tmp_path):
    compiler.made = ["a"]
    old, read, new = (open_cache(tmp_path, batch_size=n) for n in (1, 2, 4))
    left_over = tmp_path / "cache" / ".compiled-0.bin.partial"
    for cache in (old, read):
        cache.save()
    left_over.touch()
    (tmp_path / "cache" / "attention-0.json").touch()
    for path in left_over.parent.iterdir():
        os.utime(path, (0, 0))
    open_cache(tmp_path, batch_size=2).load()
    new.save()
    assert {p.name for p in left_over.parent.iterdir()} == {read.path.name, new.path.name, "attention-0.json"}


@pytest.mark.parametrize("how", ["cut", "flipped", "another file", "empty"])
def test_a_damaged_file_is_not_given_to_torch_and_is_replaced(how, compiler, tmp_path):
    cache = open_cache(tmp_path)
    compiler.made = ["a", "b"]
    cache.save()
    data = cache.path.read_bytes()
    damaged = {"cut": data[:-1], "flipped": data[:-1] + b"c", "another file": b"x" * 99, "empty": b""}[how]
    cache.path.write_bytes(damaged)
    again = open_cache(tmp_path)
    assert again.load() == [f"{cache.path}: compiled code is not loaded from there, it is damaged; the code is compiled again"]
    assert compiler.loaded == [] and again.save() and cache.path.read_bytes() == data


@pytest.mark.parametrize("how", ["group may write", "another user's", "a link", "a folder"])
def test_code_is_only_taken_from_a_file_of_one_s_own(how, compiler, tmp_path, monkeypatch):
    cache = open_cache(tmp_path)
    compiler.made = ["a"]
    cache.save()
    if how == "group may write":
        cache.path.chmod(0o660)
    elif how == "another user's":
        monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    else:
        cache.path.rename(tmp_path / "elsewhere")
        cache.path.symlink_to(tmp_path / "elsewhere") if how == "a link" else cache.path.mkdir()
    (line,) = open_cache(tmp_path).load()
    assert line.startswith(f"{cache.path}: compiled code is not loaded from there, ") and compiler.loaded == []


def test_artifacts_that_torch_cannot_use_do_not_end_the_run(compiler, tmp_path, monkeypatch):
    cache = open_cache(tmp_path)
    compiler.made = ["a"]
    cache.save()
    monkeypatch.setattr(torch.compiler, "load_cache_artifacts", lambda artifacts: 1 // 0)
    again = open_cache(tmp_path)
    assert again.load() == [f"{cache.path}: compiled code is not loaded from there, integer division or modulo by zero"]


def test_a_cache_that_cannot_be_written_does_not_end_the_run(compiler, tmp_path):
    (tmp_path / "cache").touch()
    cache = open_cache(tmp_path)
    compiler.made = ["a"]
    assert cache.load()[0].endswith("Not a directory")
    assert cache.save()[0].startswith(f"{cache.path}: compiled code cannot be kept there, ")


def test_without_a_home_folder_a_line_says_how_it_is_kept(compiler, tmp_path, monkeypatch):
    monkeypatch.setattr(compile_cache, "cache_folder", lambda: None)
    cache = open_cache(tmp_path)
    compiler.made = ["a"]
    assert "set FASTMAE_CACHE to a folder" in cache.load()[0] and cache.save() == []


def test_other_programs_have_files_of_their_own_and_what_is_not_compiled_none(compiler, tmp_path):
    other = replace(RECIPE, model=replace(RECIPE.model, depth=3))
    caches = [open_cache(tmp_path), open_cache(tmp_path, batch_size=4), open_cache(tmp_path, compile="model"),
              open_cache(tmp_path, recipe=other)]  # fmt: skip
    assert len({cache.path for cache in caches}) == 4
    assert open_cache(tmp_path, compile="auto").path is None and open_cache(tmp_path, compile="off").path is None


def test_of_processes_with_the_same_device_one_writes(compiler, tmp_path, monkeypatch):
    monkeypatch.setattr(World, "gather", lambda self, lines: ["other", *lines * 3])
    compiler.made = ["a"]
    assert [bool(open_cache(tmp_path, rank).save()) for rank in range(4)] == [False, True, False, False]


def test_a_run_loads_before_its_first_step_and_keeps_what_it_compiled_after_it(compiler, shard_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("fastmae.train.step.parallelize.compiled", lambda module, how, processes=1: module)
    compiler.made = ["a"]
    for resumed in (False, True):
        run = run_of(shard_folder, tmp_path / f"run-{resumed}", compile="blocks")
        pretrain(replace(RECIPE, steps=1, warmup_epochs=0), run)
        assert [r["step"] for r in records(run.out) if "loss" in r] == [1]
        assert compiler.loaded == [b"a"] * resumed
        assert not list(run.out.rglob("*.bin"))  # nothing in a run's folder is ever run


_COMPILED = """
import sys, torch
from dataclasses import replace
from torch._dynamo.utils import counters
from fastmae.train.pretrain.pretrain import pretrain
from tests.support.runs import RECIPE, run_of
pretrain(replace(RECIPE, steps=1, warmup_epochs=0), run_of(sys.argv[1], sys.argv[2], compile="blocks"))
print(counters["inductor"]["fxgraph_cache_hit"], counters["inductor"]["fxgraph_cache_miss"])
"""


@pytest.mark.all
def test_a_start_on_another_machine_compiles_nothing_again(shard_folder, tmp_path):
    counts = []
    for node in ("a", "b"):
        (tmp_path / node).mkdir()
        environment = {n: v for n, v in os.environ.items() if n not in NAMES} | {
            "TMPDIR": str(tmp_path / node), "FASTMAE_CACHE": str(tmp_path / "home"), "PYTHONPATH": str(Path.cwd())
        }  # fmt: skip
        command = [sys.executable, "-c", _COMPILED, str(shard_folder), str(tmp_path / f"run-{node}")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        counts.append([int(word) for word in done.stdout.splitlines()[-1].split()])
    assert counts[0][0] == 0 < counts[0][1] and counts[1] == [counts[0][1], 0]
