"""Every kernel compiles for A100, H100 and B200 without a GPU, within its limits, and as the committed table says."""

import json

import pytest
import triton

from fastmae.benchmarks.resources import TABLE, TARGETS, exceeded, measure

OTHERS = [pytest.param(target, marks=pytest.mark.all) for target in TARGETS if target != 90]


@pytest.fixture(scope="module", params=[90, *OTHERS], ids=lambda target: f"sm_{target}")
def found(request):
    return measure((request.param,))


def test_no_kernel_spills_or_needs_too_much(found):
    assert exceeded(found) == []


def test_the_committed_table_is_what_the_compiler_says(found):
    committed = json.loads(TABLE.read_text())
    assert committed["kernels"].keys() == found["kernels"].keys()
    asked = next(iter(found["kernels"].values())).keys()
    committed["kernels"] = {name: {target: row[target] for target in asked} for name, row in committed["kernels"].items()}
    if committed["triton"] != triton.__version__:
        pytest.skip(f"the table is of triton {committed['triton']}; this is {triton.__version__}, which counts otherwise")
    assert committed == found, "write it anew: python -m fastmae.benchmarks kernels --resources --save"


def test_each_limit_is_checked():
    good = {"registers": 128, "stack": 0, "shared": 48 * 1024}
    for change in ({"registers": 129}, {"stack": 8}, {"shared": 48 * 1024 + 1}):
        assert len(exceeded({"kernels": {"k": {"sm_90": {**good, **change}, "sm_80": good}}})) == 1
