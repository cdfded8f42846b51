"""Every op under pytest-benchmark, for those who compare runs with its tools: ``pytest tests/kernels/test_kernel_speed.py``."""

import pytest
import torch

from fastmae.benchmarks.kernels.cases import CASES, Sizes
from fastmae.benchmarks.timing import synchronize
from fastmae.model.config import preset

pytest.importorskip("pytest_benchmark")

pytestmark = pytest.mark.timing


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_speed_of(case, device, benchmark):
    place = torch.device(device)
    on_gpu = device == "cuda"
    sizes = Sizes.of(preset("base"), 256 if on_gpu else 4)
    inputs = case.inputs(sizes, place, torch.bfloat16 if on_gpu else torch.float32)

    def run():
        out = case.op(*inputs)
        synchronize(place)
        return out

    with torch.no_grad():
        out = benchmark.pedantic(run, rounds=20 if on_gpu else 3, warmup_rounds=2 if on_gpu else 1)
    assert all(o.isfinite().all() for o in (out if isinstance(out, tuple) else (out,)))
