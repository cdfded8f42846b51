"""Every kernel compiles for A100, H100 and B200 without a GPU, spills nothing, and fits any multiprocessor."""

import pytest

from fastmae.benchmarks.resources import TARGETS, resources, variants


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("variant", variants(), ids=lambda v: v.name)
def test_kernel_compiles_without_spills(variant, target):
    needs = resources(variant, target)
    assert needs.stack == 0
    assert needs.shared <= 48 * 1024
    assert needs.registers <= 128
