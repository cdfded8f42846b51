"""Part 2: what each kernel is worth, larger batches and models, training from shards, and faults in it."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.gpu.item import FASTMAE, Item

pytestmark = pytest.mark.part(2)
_READS_DATA = ("tyro", "PIL", "safetensors", "simplejpeg", "webdataset", "xxhash")
_STEPS = 30


@pytest.mark.worth(1)
@pytest.mark.seconds(110, 25)
def test_kernels_off(report: Item):
    """The step with each Triton kernel off alone, with all of them off, with nothing and with everything fused in blocks, and
    with a bf16 residual stream."""
    if report.tiny:  # on a CPU there is no kernel to switch off
        report.bench(
            "waterfall", "--model", "tiny", "--batch", 4, "--image-size", 64, "--rounds", 1, "--only", "exact skipping"
        )
    else:
        switches = ("kernel ", "Triton", "nothing fused", "all fused", "bf16 residual")
        report.bench("waterfall", "--batch", 256, "--rounds", 3, "--only", *switches,
                     "--together", max(1, report.memory // 20))  # fmt: skip


@pytest.mark.worth(2)
@pytest.mark.seconds(60, 20)
def test_large_batch(report: Item):
    """A training step of ViT-B at 1024 images, against the rival."""
    sizes = ("--models", "tiny", "--batches", 8, "--image-size", 64) if report.tiny else ("--models", "base", "--batches", 1024)
    report.bench("step", *sizes, "--rounds", 1 if report.tiny else 3, "--contenders", "rival", "fastmae")


@pytest.mark.worth(3)
@pytest.mark.seconds(80, 25)
def test_large_models(report: Item):
    """A training step of ViT-L at 256 images and ViT-H at 128, blocks compiled, against the rival."""
    for model, batch in [("tiny", 2)] if report.tiny else [("large", 256), ("huge", 128)]:
        small = ("--image-size", 64) if report.tiny else ()
        report.bench("step", "--models", model, "--batches", batch, *small, "--rounds", 1 if report.tiny else 3,
                     "--contenders", "rival", "fastmae", "--compile", "blocks")  # fmt: skip


@pytest.mark.worth(4)
@pytest.mark.seconds(40, 25)
@pytest.mark.needs(*_READS_DATA)
def test_fed_step(report: Item):
    """The step from shards beside the same step from memory, and its wait for data."""
    tiny = ("--model", "tiny", "--batch", 4, "--image-size", 64, "--steps", 4, "--workers", 2)
    report.bench("fed-step", "--data", shards(report), *(tiny if report.tiny else ()))


@pytest.mark.worth(5)
@pytest.mark.seconds(35, 25)
@pytest.mark.needs(*_READS_DATA)
def test_killed_worker(report: Item):
    """Thirty steps in which a loader's worker is killed."""
    killed: list[int] = []

    def kill(process: subprocess.Popen) -> None:
        if not killed and steps_of(folder) >= 5:
            killed.extend(workers_of(process.pid)[:1])
            for pid in killed:
                os.kill(pid, signal.SIGKILL)

    folder = fresh(report, "killed")
    report.run(*training(report, folder), meanwhile=kill)
    report.values |= {"killed at step": 5, "weights": digest(folder)}
    assert killed, "the run had ended before a worker could be killed"
    text = report.outcomes[-1].text + (folder / "metrics.jsonl").read_text()
    assert str(killed[0]) in text or "SIGKILL" in text, "the run does not name the worker that was killed"


@pytest.mark.worth(6)
@pytest.mark.seconds(50, 35)
@pytest.mark.needs(*_READS_DATA)
def test_resume(report: Item):
    """Thirty steps, stopped in between and resumed: its weights are bitwise those of the run with a killed worker."""
    stopped: list[float] = []

    def stop(process: subprocess.Popen) -> None:
        if not stopped and steps_of(folder) >= 10:
            stopped.append(time.monotonic())
            process.send_signal(signal.SIGTERM)

    folder = fresh(report, "resumed")
    report.run(*training(report, folder), meanwhile=stop)
    report.values |= {"stopped after step": steps_of(folder)}
    report.run(*training(report, folder))
    other = report.results / "runs" / "killed"
    report.values |= {"weights": digest(folder), "losses": losses_of(folder)}
    assert report.values["stopped after step"] < _STEPS, "the run had ended before it could be stopped"
    if not (other / f"step-{_STEPS:07d}").exists():
        pytest.skip("resumed, and nothing to compare with: the run with a killed worker does not exist")
    report.values["losses of the other"] = losses_of(other)
    assert digest(other) == report.values["weights"], "resumed weights differ from those of a run that was not stopped"


@pytest.mark.worth(7)
@pytest.mark.seconds(60, 40)
@pytest.mark.needs(*_READS_DATA)
def test_training_tests(report: Item):
    """The `gpu` tests of loading and training."""
    report.test(3)


@pytest.mark.worth(8)
@pytest.mark.seconds(60, 60)
def test_other_tests(report: Item):
    """All other `gpu` tests: the speed of kernels, the benchmarks themselves, saves."""
    report.test(9)


@pytest.mark.worth(9)
@pytest.mark.seconds(45, 10)
def test_sanitizer(report: Item):
    """The kernels' `gpu` tests under compute-sanitizer's memory checker, as many as there is time for."""
    if not shutil.which("compute-sanitizer"):
        pytest.skip("compute-sanitizer is not on the PATH; it comes with the CUDA toolkit")
    report.environment = {**report.environment, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    report.test(1, before=("compute-sanitizer", "--tool", "memcheck", "--target-processes", "all", "--error-exitcode", "9"),
                together=2)  # fmt: skip


def shards(report: Item) -> Path:
    """The given ones, or generated ones."""
    generated = report.results / "runs" / "shards"
    if report.data is None and not (generated / "index.json").exists():
        report.run(sys.executable, Path(__file__).with_name("generated_shards.py"), generated, 96 if report.tiny else 2048)
    return report.data or generated


def fresh(report: Item, name: str) -> Path:
    """A new folder of a run."""
    folder = report.results / "runs" / name
    shutil.rmtree(folder, ignore_errors=True)
    return folder


def training(report: Item, out: Path) -> list[object]:
    """A run of ``_STEPS`` steps, all logged."""
    size = (
        ("tiny", "--img-size", 64, "--batch-size", 8) if report.tiny else ("base", "--batch-size", 256, "--compile", "blocks")
    )
    return [*FASTMAE, "pretrain", *size, "--device", report.device, "--data", shards(report), "--out", out, "--steps", _STEPS,
            "--workers", 2 if report.tiny else 8, "--log-every", 1, "--save-every", _STEPS]  # fmt: skip


def losses_of(folder: Path) -> dict[int, float]:
    """The loss of each step that a run has logged."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    return {r["step"]: r["loss"] for r in records if "loss" in r}


def steps_of(folder: Path) -> int:
    """Steps that a run has logged."""
    return max(losses_of(folder), default=0)


def digest(folder: Path) -> str:
    """Of a run's last weights."""
    return hashlib.sha256((folder / f"step-{_STEPS:07d}" / "model.safetensors").read_bytes()).hexdigest()


def workers_of(pid: int) -> list[int]:
    """A run's loader workers: forked, so that their command line is its own; compilers' processes have another."""
    proc = Path("/proc")
    children = [int(c) for task in (proc / str(pid) / "task").iterdir() for c in (task / "children").read_text().split()]
    same = (proc / str(pid) / "cmdline").read_bytes()
    return [child for child in children if (proc / str(child) / "cmdline").read_bytes() == same]
