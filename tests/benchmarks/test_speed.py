"""Kernels are timed by every body that runs here, and what is timed computes the same."""

from functools import partial
from unittest.mock import Mock

import pytest
import torch

from fastmae.benchmarks.kernels import speed as kernels
from fastmae.benchmarks.timing import LossesDiffer
from fastmae.model.config import preset

CPU = torch.device("cpu")


def test_every_op_is_measured_by_every_body_that_runs_here(compiler, monkeypatch):
    monkeypatch.setattr(kernels, "_MOST_SETS", 2)
    found = kernels.measure_kernels(["tiny"], 1, CPU)
    twins = {(c.name, "twin") for c in kernels.CASES}
    compiled = {(c.name, "compiled twin") for c in kernels.CASES if c.name != "resized_crop"}  # its graph would be one batch's
    assert {(r["op"], r["body"]) for r in found["rows"]} == twins | compiled
    assert found["notes"] == ["no row for Triton: its kernels need a CUDA device"]
    for row in found["rows"]:
        assert row["share_of_copy"] == pytest.approx(row["bytes"] / row["microseconds"] * 1e6 / found["copy_bytes_per_second"])


@pytest.mark.parametrize("case", kernels.CASES, ids=lambda c: c.name)
def test_measured_bodies_compute_the_same(case, device, compiler):
    sizes = kernels.Sizes.of(preset("tiny", img_size=32), 2)
    inputs = case.inputs(sizes, torch.device(device), torch.float32)
    for name, body in kernels.bodies(case, torch.device(device)).items():
        kernels.check_equal(case, name, body, inputs)
        with pytest.raises(LossesDiffer, match=f"{case.name} by {name} differs"):
            kernels.check_equal(case, name, partial(_moved, body), inputs)


def test_one_wrong_row_of_many_is_found():
    case = kernels.Case("copy", inputs=Mock(), op=torch.clone, twin=torch.clone, forward_bytes=Mock())
    x = torch.randn(50_000, 3, generator=torch.Generator().manual_seed(0))
    kernels.check_equal(case, "twin", torch.clone, (x,))
    with pytest.raises(LossesDiffer, match="copy by twin differs"):
        kernels.check_equal(case, "twin", lambda x: torch.cat([x[:-1], x[:1]]), (x,))


def _moved(body, *inputs):
    results = body(*inputs)
    return tuple(r * 1.02 + 1 for r in results) if isinstance(results, tuple) else results * 1.02 + 1


@pytest.mark.gpu
def test_kernels_are_measured_on_a_gpu():
    found = kernels.measure_kernels(["tiny"], 8, torch.device("cuda"))
    assert {r["body"] for r in found["rows"]} == {"triton", "twin", "compiled twin"}
