"""`make gpu`: what hangs or fails costs its own result alone, and nothing runs on past the part's time."""

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from benchmarks.gpu import conftest
from benchmarks.gpu.archive import pack
from benchmarks.gpu.checkout import ROOT, environment
from benchmarks.gpu.command import Outcome
from benchmarks.gpu.item import Item, counts_of, reason_in, worths_of
from fastmae.benchmarks.training.waterfall import SWITCHES

ITEMS = r"""
import sys, pytest
from benchmarks.gpu.item import Item

def item(part, worth, seconds):
    def mark(function):
        for marker in (pytest.mark.part(part), pytest.mark.worth(worth), pytest.mark.seconds(seconds, seconds)):
            function = marker(function)
        return function
    return mark

@item(1, 4, 999)
def test_too_long(report):
    report.run(sys.executable, "-c", "print('never')")

@item(1, 3, 20)
def test_well(report):
    report.run(sys.executable, "-c", "import json; print('some text'); print(json.dumps({'rows': [7]})); print('bye')")
    report.values["found"] = 3

@item(1, 1, 1)
def test_hanging(report):
    code = "import subprocess, time; p = subprocess.Popen(['sleep', '60']); print(p.pid, flush=True); time.sleep(60)"
    report.run(sys.executable, "-c", code)

@item(1, 2, 20)
def test_failing(report):
    report.run(sys.executable, "-c", "import sys; print('what went wrong'); sys.exit(3)")

@item(1, 5, 1)
@pytest.mark.needs("no_such_package")
def test_lacking(report):
    pass

@item(2, 1, 1)
def test_other_part(report):
    pass
"""

ENDLESS = r"""
import pytest, sys
from pathlib import Path
from benchmarks.gpu.item import Item
pytestmark = [pytest.mark.part(1), pytest.mark.seconds(60, 60)]

@pytest.mark.worth(1)
def test_done(report):
    report.run(sys.executable, "-c", "pass")

@pytest.mark.worth(2)
def test_endless(report, monkeypatch):
    run = Item._run
    code = "import os, time; print(os.getpid(), flush=True); time.sleep(99)"
    endless = [sys.executable, "-c", code]
    monkeypatch.setattr(Item, "_run", lambda self, command, *more, **others: run(self, endless, *more, **others))
    monkeypatch.setattr("benchmarks.gpu.item.worths_of", lambda path: {1} if path.stem in ("a", "b") else set())
    rglob = Path.rglob
    monkeypatch.setattr("pathlib.Path.rglob", lambda folder, pattern: (
        [folder / "a.py", folder / "b.py"] if pattern == "test_*.py" else rglob(folder, pattern)))
    report.test(1, together=2)
"""


def run_items(folder: Path, *flags: str) -> tuple[int, str, dict[str, dict]]:
    """Exit code, output and the items' JSON of a report of ``ITEMS``."""
    (folder / "items").mkdir()
    (folder / "items" / "conftest.py").write_text("from benchmarks.gpu.conftest import *\n")
    (folder / "items" / "test_items.py").write_text(ITEMS)
    command = [sys.executable, "-m", "pytest", "-c", str(ROOT / "pyproject.toml"), str(folder / "items"), "--part", "1",
               "--results", str(folder / "results"), *flags]  # fmt: skip
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    items = {p.stem: json.loads(p.read_text()) for p in (folder / "results" / "items").glob("*.json")}
    return found.returncode, found.stdout + found.stderr, items


def test_an_item_that_fails_or_hangs_costs_its_own_result_alone(tmp_path):
    began = time.monotonic()
    code, text, items = run_items(tmp_path, "--device", "cpu", "--minutes", "1")
    assert code == 1 and time.monotonic() - began < 30, text
    assert {name: item["status"] for name, item in items.items()} == {
        "part1-hanging": "timeout", "part1-failing": "failed", "part1-well": "ok", "part1-too-long": "skipped",
        "part1-lacking": "skipped",
    }, text  # fmt: skip
    well, hanging = items["part1-well"], items["part1-hanging"]
    assert (
        well["documents"] == [{"rows": [7]}]
        and well["programs"][0]["tail"] == "some text\nbye"
        and well["values"] == {"found": 3}
    )
    assert items["part1-failing"]["reason"] == "exit code 3: what went wrong"
    assert items["part1-too-long"]["reason"].startswith("expected to take 999 s, and ")
    assert items["part1-lacking"]["reason"].startswith("needs no_such_package: pip install")
    assert 'File "<string>", line 1 in <module>' in hanging["programs"][0]["tail"]  # where it hung
    child = int(hanging["programs"][0]["tail"].split()[0])
    assert not Path(f"/proc/{child}/cmdline").exists() or Path(f"/proc/{child}/cmdline").read_bytes() == b""
    order = [line.split(": ")[0] for line in text.splitlines() if ": at most " in line]
    assert order == ["part1-hanging", "part1-failing", "part1-well"]
    with tarfile.open(tmp_path / "results" / "gpu-part1.tar.gz") as archive:
        assert {f"items/{name}.json" for name in items} <= set(archive.getnames())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_each_item_says_that_there_is_no_device(tmp_path):
    code, text, items = run_items(tmp_path)
    assert code == 0 and len(items) == 5
    assert {(i["status"], i["reason"]) for i in items.values()} == {
        ("skipped", f"no CUDA device: torch {torch.__version__} sees none")
    }
    assert all(f"{name}: skipped after 0 s: no CUDA device" in text for name in items)


def test_an_archive_that_would_be_too_large_lacks_the_largest_files_and_no_item(tmp_path):
    random = np.random.default_rng(0)
    for name, size in (("items/a.json", 30_000), ("items/a.log", 40_000), ("day.json", 20_000), ("trace.bin", 60_000),
                       ("cache/large.bin", 200_000), ("gpu.tar.gz", 10_000)):  # fmt: skip
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(random.bytes(size))
    assert pack(tmp_path, tmp_path / "gpu.tar.gz", limit=60_000) == ["trace.bin", "items/a.log"]
    assert (tmp_path / "gpu.tar.gz").stat().st_size < 60_000
    with tarfile.open(tmp_path / "gpu.tar.gz") as archive:
        assert set(archive.getnames()) == {"items/a.json", "day.json"}


def test_what_a_test_run_printed_is_counted_and_the_test_that_hung_is_named():
    done = "tests/test_a.py::test_b[1 - 2] PASSED       [ 25%]\ntests/test_a.py::test_c SKIPPED (no CU...) [ 50%]\n"
    hung = "tests/test_a.py::test_d[cuda] Timeout (0:01:00)!\nThread 0x1 (most recent call first):\n"
    assert counts_of(done) == {"passed": 1, "skipped": 1}
    assert counts_of(done + hung + "Fatal Python error: Aborted\n") == {
        "passed": 1, "skipped": 1, "running": "tests/test_a.py::test_d[cuda]"}  # fmt: skip
    assert counts_of(done + hung + "PASSED    [ 75%]\n= FAILURES =\nFAILED tests/test_a.py::test_z\n") == {
        "passed": 2, "skipped": 1}  # fmt: skip


def test_files_are_found_by_what_their_tests_are_worth():
    found = {path.stem: worths_of(path) for path in (ROOT / "tests").rglob("test_*.py")}
    assert found["test_masked_mse"] == {1} and found["test_step"] == {2} and found["test_loader"] == {2, 3}
    assert found["test_state"] == {9} and found["test_files"] == set()
    assert found["test_save_cost"] == {9}  # whose fixture takes the device


def running(folder: Path, **fields) -> Item:
    (folder / "items").mkdir()
    return Item(name="part1-x", results=folder, memory=0, tiny=False, data=None, reference=None, environment={},
                deadline=time.monotonic() + 60, **{"device": "cuda", **fields})  # fmt: skip


def test_the_waterfall_of_a_report_asks_for_switches_that_exist(tmp_path, monkeypatch, request):
    for marker in conftest._MARKERS:
        request.config.addinivalue_line("markers", marker)
    from benchmarks.gpu.test_part2 import test_kernels_off

    asked = []
    monkeypatch.setattr(Item, "bench", lambda self, *words: asked.extend(words))
    test_kernels_off(running(tmp_path))
    texts = asked[asked.index("--only") + 1 : asked.index("--together")]
    names = [s.name for s in SWITCHES if "cuda" in s.devices]
    assert [text for text in texts if not any(text in name for name in names)] == []


@pytest.mark.parametrize("rows", [[], [{"contender": "rival"}]])
def test_an_item_whose_benchmark_has_not_measured_fastmae_fails(rows, tmp_path, monkeypatch):
    document = {"step base": {"rows": rows, "notes": ["fastmae, base at batch 256: out of memory"]}}
    monkeypatch.setattr(Item, "run", lambda self, *command: Mock(document=document))
    with pytest.raises(pytest.fail.Exception, match=r"step base: fastmae was not measured: .* out of memory"):
        running(tmp_path).bench("step")


def test_a_benchmark_without_a_result_has_not_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(Item, "run", lambda self, *command: Mock(document=None))
    with pytest.raises(pytest.fail.Exception, match="ended without a result"):
        running(tmp_path).bench("step")


def test_an_item_all_of_whose_tests_were_skipped_fails_where_there_is_a_device(tmp_path, monkeypatch):
    log = tmp_path / "log"
    log.write_text("tests/test_a.py::test_c SKIPPED (no CUDA device) [100%]\n")
    outcome = Outcome(command="", status="ok", exit_code=0, seconds=1.0, log=log)
    monkeypatch.setattr(Item, "_run", lambda *_, **__: outcome)
    with pytest.raises(pytest.fail.Exception, match=r"no test ran: .*test_masked_mse \(1 skipped\)"):
        running(tmp_path).test(1)


@pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=pytest.mark.all), signal.SIGTERM])
def test_a_report_that_is_interrupted_ends_its_programs_and_keeps_what_it_has(number, tmp_path):
    (tmp_path / "items").mkdir()
    (tmp_path / "items" / "conftest.py").write_text("from benchmarks.gpu.conftest import *\n")
    (tmp_path / "items" / "test_items.py").write_text(ENDLESS)
    command = [sys.executable, "-m", "pytest", "-c", str(ROOT / "pyproject.toml"), str(tmp_path / "items"), "--device", "cpu",
               "--results", str(tmp_path / "results")]  # fmt: skip
    program = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    logs = [tmp_path / "results" / "items" / f"part1-endless.{name}.log" for name in "ab"]
    until = time.monotonic() + 60
    while not all(log.exists() and log.read_text().endswith("\n") for log in logs) and time.monotonic() < until:
        time.sleep(0.05)
    children = [int(log.read_text()) for log in logs]
    began = time.monotonic()
    program.send_signal(number)
    assert program.wait(30) == 2 and time.monotonic() - began < 15
    assert not any(Path(f"/proc/{child}").exists() for child in children)
    with tarfile.open(tmp_path / "results" / "gpu.tar.gz") as archive:
        assert {"items/part1-done.json", "items/part1-endless.a.log"} <= set(archive.getnames())


def test_the_reason_of_a_failure_is_the_error_and_not_the_advice_after_it():
    assert reason_in("Traceback:\n  File x\ntorch.X.InductorError: no compiler\n\nSet TORCH_LOGS\n") == (
        "torch.X.InductorError: no compiler"
    )
    assert reason_in("what went wrong\n") == "what went wrong" and reason_in("") == ""


def test_programs_of_a_report_import_this_checkout_from_anywhere(tmp_path):
    variables = environment(tmp_path)
    code = "import fastmae, fastmae.train, fastmae.benchmarks, fastmae.data as d; print(fastmae.__file__, d.__file__)"
    found = subprocess.run([sys.executable, "-c", code], env=variables, cwd=ROOT, capture_output=True, text=True, check=True)
    assert all(path.startswith(str(tmp_path / "site")) for path in found.stdout.split())
    assert variables["TORCHINDUCTOR_CACHE_DIR"].startswith(str(tmp_path))


@pytest.mark.all
@pytest.mark.parametrize("part", [1, 2])
def test_a_dry_run_leaves_every_items_json(part, tmp_path):
    command = ["make", "gpu", f"PYTHON={sys.executable}", "DEVICE=cpu", "TINY=1", f"PART={part}", f"RESULTS={tmp_path}",
               "MINUTES=20"]  # fmt: skip
    subprocess.run(command, cwd=ROOT, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    items = {p.stem: json.loads(p.read_text()) for p in (tmp_path / "items").glob("*.json")}
    assert len(items) == {1: 7, 2: 9}[part]
    assert all(i["status"] == "ok" or (i["status"] == "skipped" and i["reason"]) for i in items.values())
    assert sum(i["status"] == "ok" for i in items.values()) >= {1: 6, 2: 8}[part]
    assert (tmp_path / f"gpu-part{part}.tar.gz").stat().st_size < 16e6 and len(list(tmp_path.glob("*-cpu-*.json"))) == 1
