"""kernels --check: errors of every op beside torch's own, and an op that errs too much ends with 1 and is named."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch

from fastmae import kernels
from fastmae.benchmarks.cli import main
from fastmae.benchmarks.kernels import check
from fastmae.benchmarks.kernels.formulas import FORMULAS
from fastmae.benchmarks.kernels.shape import Shape
from fastmae.kernels import dispatch

ODD = "B=1,C=2,H=16,W=24,p=4,D=33"
COMMAND = ["kernels", "--check", "--device", "cpu", "--shape", ODD]
OPS = {name.removesuffix("_ref") for name in kernels.__all__ if name.endswith("_ref")}


def test_every_op_errs_less_than_is_allowed(device):
    found = check.measure_errors([ODD, "B=2,C=1,H=8,W=4,p=2,D=17"], torch.device(device))
    assert found["wrong"] == []
    rows = found["rows"]
    assert {r["op"].split()[0] for r in rows} == OPS
    assert {r["dtype"] for r in rows} == {"fp32", "bf16", "fp16", "int32", "uint8"}
    assert {r["backend"] for r in rows} == {*check.backends(torch.device(device))}
    assert {r["tensor"] for r in rows if r["op"] == "decoder_input"} == {"output", "gradient of x", "gradient of mask_token"}
    floats = [r for r in rows if r["unit"] == "ulps"]
    assert all(r["allowed"] == 2 * r["torch_error"] + 1 for r in floats)
    assert {r["op"] for r in floats if r["error"] > 0} >= {"gather_patches", "masked_mse", "decoder_input"}


def test_an_op_that_errs_too_much_is_named(monkeypatch, capsys):
    formula = next(f for f in FORMULAS if f.name == "decoder_input")
    off = lambda *a: formula.op(*a) * (1 + 4 * torch.finfo(torch.float32).eps)  # noqa: E731
    monkeypatch.setattr(check, "FORMULAS", (dataclasses.replace(formula, op=off),))
    assert main(COMMAND) == 1
    out, error = capsys.readouterr()
    assert f"decoder_input by twin, inputs fp32, {Shape.parse(ODD)}: output errs by 4" in error
    assert (
        f"bf16, {Shape.parse(ODD)}: gradient of x" not in error
    )  # four units of float32's last place are less than one of bf16's
    document = json.loads(out.splitlines()[-1])["kernels check"]
    assert document["wrong"] == [line.removeprefix("fastmae bench: ") for line in error.splitlines()]
    row = document["rows"][0]
    assert row["error"] == pytest.approx(row["relative_error"] / torch.finfo(torch.float32).eps)


def test_errors_are_counted_in_units_of_the_last_place():
    exact = torch.tensor([1.0, -4.0], dtype=torch.float64)
    own = exact.bfloat16()
    row = check.compare(own + torch.tensor([0.0625, 0]).bfloat16(), own, exact)
    assert (row["error"], row["torch_error"], row["allowed"]) == (2.0, 0.0, 1.0)  # bf16's eps is 2**-7
    assert row["relative_error"] == 0.0625 / 4
    for wrong in (own * float("nan"), own.float()):  # no number, and another dtype than is asked for
        row = check.compare(wrong, own, exact)
        assert not row["error"] <= row["allowed"]
    infinite = own * float("inf")
    row = check.compare(infinite, infinite, exact)  # not even where torch's own is
    assert not row["error"] <= row["allowed"]
    ids, pixels = torch.tensor([3, 1], dtype=torch.int32), torch.tensor([3, 1], dtype=torch.uint8)
    for exact, own, is_right in ((ids, ids, True), (ids.flip(0), ids, False), (pixels + 0.5, pixels, True),
                                 (pixels + 0.6, pixels, False)):  # fmt: skip
        row = check.compare(own, own, exact)
        assert (row["error"] <= row["allowed"]) == is_right


def test_a_shape_has_every_size():
    shape = Shape.parse("C=13,H=32,D=1280")
    assert (shape.B, shape.N, shape.heads, shape.sizes().L, shape.sizes().P) == (2, 25, 20, 24, 832)
    assert str(Shape.parse("D=80,N=7,heads=5")) == "B=2,C=3,H=64,W=48,p=8,D=80,N=7,heads=5"
    assert [Shape(D=D).heads for D in (33, 96, 240, 768)] == [1, 3, 3, 12]


def test_a_shape_that_an_op_does_not_take_is_noted(monkeypatch):
    monkeypatch.setattr(check, "FORMULAS", tuple(f for f in FORMULAS if f.name == "short_attention"))
    found = check.measure_errors(["B=1,N=321", "B=1,D=129", "B=1,N=3"], torch.device("cpu"))
    assert {r["shape"] for r in found["rows"]} == {str(Shape(B=1, N=3))}
    noted = [f"short_attention, {shape}: takes at most 320 tokens N and 128 channels of a head"
             for shape in (Shape(B=1, N=321), Shape(B=1, D=129))]  # fmt: skip
    assert found["notes"][-2:] == noted


@pytest.mark.parametrize("shape", ["B=0", "B", "Q=3", "B=2 C=3", "H=10,p=4", "H=8,W=8,p=8", "D=96,heads=5"])
def test_a_wrong_shape_is_one_line(shape, capsys):
    assert main(["kernels", "--check", "--device", "cpu", "--shape", shape]) == 2
    out, error = capsys.readouterr()
    assert out == "" and error.count("\n") == 1


@pytest.mark.parametrize(("flags", "message"), [
    (["--check", "--shape", "B=1,D=1,N=1000000000000000"], "shape must fit into memory, got B=1,C=3,H=64,W=48,p=8,D=1,"),
    (["--check", "--models", "large"], "--check takes its sizes from --shape, not from --models or --batch"),
    (["--save"], "--save needs --resources, whose table it writes"),
])  # fmt: skip
def test_what_does_not_fit_or_would_be_ignored_is_one_line(flags, message, capsys):
    assert main(["kernels", "--device", "cpu", *flags]) == 2
    out, error = capsys.readouterr()
    assert out == "" and error.startswith(f"fastmae bench: {message}") and error.count("\n") == 1


def test_twins_alone_are_noted(monkeypatch):
    monkeypatch.setattr(check, "FORMULAS", ())
    for mode, reason in (("torch", "FASTMAE_KERNELS is torch"), ("auto", "its kernels need a CUDA device")):
        monkeypatch.setenv("FASTMAE_KERNELS", mode)
        assert check.measure_errors([ODD], torch.device("cpu"))["notes"][0].startswith(f"no row for Triton: {reason}")


@pytest.mark.skipif(dispatch.INTERPRETED, reason="here Triton's kernels run on a CPU")
def test_kernels_that_cannot_run_are_not_passed(monkeypatch, capsys):
    monkeypatch.setenv("FASTMAE_KERNELS", "triton")
    assert main(COMMAND) == 2
    needs = "its kernels need a CUDA device, or TRITON_INTERPRET=1"
    assert capsys.readouterr().err == f"fastmae bench: FASTMAE_KERNELS is triton, and {needs}\n"


def test_a_shape_without_check_is_one_line(capsys):
    assert main(["kernels", "--device", "cpu", "--shape", ODD]) == 2
    assert capsys.readouterr().err == "fastmae bench: --shape needs --check; times are taken of --models\n"


@pytest.mark.all
def test_kernels_err_less_than_is_allowed_in_the_interpreter():
    command = [sys.executable, "-m", "fastmae.benchmarks", *COMMAND]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])["kernels check"]["rows"]
    assert {r["op"].split()[0] for r in rows if r["backend"] == "interpreter"} == OPS
    assert {r["inputs"] for r in rows if r["backend"] == "interpreter"} == {"fp32"}
