"""Part 1: is it right, and how fast is a step? The most informative items first."""

import shutil
import sys

import pytest

from benchmarks.gpu.item import FASTMAE, Item, cores

pytestmark = pytest.mark.part(1)
_ENVIRONMENT = "import json, sys, torch; from fastmae.benchmarks.machine import environment; print(json.dumps(environment(torch.device(sys.argv[1]))))"  # fmt: skip # noqa: E501


@pytest.mark.worth(1)
@pytest.mark.seconds(12, 8)
def test_versions(report: Item):
    """Versions of everything, and the device's clocks and limits."""
    report.run(sys.executable, "-c", _ENVIRONMENT, report.device)
    if report.device == "cuda" and shutil.which("nvidia-smi"):
        report.run("nvidia-smi", "-q", "-d", "CLOCK,POWER,PERFORMANCE,MEMORY,COMPUTE")


@pytest.mark.worth(2)
@pytest.mark.seconds(30, 20)
@pytest.mark.needs("tyro")
def test_doctor(report: Item):
    """`fastmae doctor` on this machine."""
    report.run(*FASTMAE, "doctor")


@pytest.mark.worth(3)
@pytest.mark.seconds(75, 45)
def test_kernels(report: Item):
    """The `gpu` tests of the kernels that a training step calls: values, gradients, under torch.compile."""
    report.test(1, together=beside(report))


@pytest.mark.worth(4)
@pytest.mark.seconds(180, 25)
def test_step(report: Item):
    """A training step of ViT-B by the reference, its rival and fastmae, whose compiled gradients are compared with eager ones
    before anything is timed; and where its time goes. First what blocks fuse is measured, once for all items."""
    clone = ("--reference", report.reference) if report.reference else ()
    tiny = ("--models", "tiny", "--batches", 4, "--image-size", 64, "--rounds", 1)
    report.bench("step", "--profile", *clone, *(tiny if report.tiny else ("--models", "base", "--batches", 256, "--rounds", 3)))


@pytest.mark.worth(5)
@pytest.mark.seconds(20, 15)
def test_attention(report: Item):
    """Each attention backend on the shapes of ViT-B and ViT-H: 50, 65, 197 and 257 tokens."""
    report.bench("attention", "--models", *(["tiny"] if report.tiny else ["base", "huge"]))


@pytest.mark.worth(6)
@pytest.mark.seconds(110, 45)
def test_gradients(report: Item):
    """Gradients of the compiled model against those of the eager one on photographs, parameter by parameter, with Inductor's
    mix-order reduction and without, and with everything fused by name."""
    tiny = ("--model", "tiny", "--batch", 4, "--image-size", 32)
    data = ("--data", report.data) if report.data else ()
    report.bench("gradients", *data, *(tiny if report.tiny else ()), "--modes", "blocks" if report.tiny else "model")


@pytest.mark.worth(7)
@pytest.mark.seconds(60, 45)
def test_step_tests(report: Item):
    """The `gpu` tests of the step itself: graphs, attention, crops."""
    report.test(2, together=beside(report))


def beside(report: Item) -> int:
    """Test files to run at the same time: compiling kernels takes longest, and each holds some of the device's memory."""
    return max(1, min(cores() // 2, report.memory // 20 if report.device == "cuda" else 2))
