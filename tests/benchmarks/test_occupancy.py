"""The predicted occupancy is the one that NVIDIA's own calculator gives, whose header comes with Triton."""

import shutil
import subprocess
from itertools import product
from pathlib import Path

import pytest
import triton

from fastmae.benchmarks.kernels.occupancy import occupancy

PROGRAM = """
#include <stdio.h>
#include "cuda_occupancy.h"
int main(void) {
  int target, registers, warps; long shared;
  while (scanf("%d %d %ld %d", &target, &registers, &shared, &warps) == 4) {
    size_t of_sm = (target == 80 ? 164 : 228) * 1024ul, of_block = of_sm - 1024;
    cudaOccDeviceProp gpu = {target / 10, 0, 1024, 2048, 65536, 65536, 32, 48 * 1024, of_sm, 132, of_block, 1024};
    cudaOccFuncAttributes kernel = {0}; cudaOccDeviceState state = {0}; cudaOccResult found = {0};
    kernel.maxThreadsPerBlock = 1024; kernel.numRegs = registers; kernel.maxDynamicSharedSizeBytes = of_block;
    kernel.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN; state.carveoutConfig = SHAREDMEM_CARVEOUT_MAX_SHARED;
    if (cudaOccMaxActiveBlocksPerMultiprocessor(&found, &gpu, &kernel, &state, warps * 32, shared)) return 1;
    printf("%.17g\\n", found.activeBlocksPerMultiprocessor * warps / 64.0);
  }
  return 0;
}
"""
LAUNCHES = list(
    product((80, 90, 100), (16, 17, 40, 65, 128, 168, 255), (0, 16, 4096, 48 * 1024, 100 * 1024 + 1), (1, 2, 4, 8, 16))
)


@pytest.mark.skipif(not shutil.which("cc"), reason="needs a C compiler to compile cuda_occupancy.h with")
def test_occupancy_is_what_nvidias_calculator_says(tmp_path):
    headers = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    (tmp_path / "calculator.c").write_text(PROGRAM)
    subprocess.run(["cc", "-w", f"-I{headers}", "-o", tmp_path / "calculator", tmp_path / "calculator.c"], check=True)
    lines = "".join(f"{target} {registers} {shared} {warps}\n" for target, registers, shared, warps in LAUNCHES)
    out = subprocess.run([tmp_path / "calculator"], input=lines, capture_output=True, text=True, check=True).stdout
    expected = dict(zip(LAUNCHES, map(float, out.split()), strict=True))
    found = {launch: occupancy(launch[0], registers=launch[1], shared=launch[2], warps=launch[3]) for launch in LAUNCHES}
    assert found == expected
    assert len(set(found.values())) > 10


def test_occupancy_of_the_programming_guides_limits():
    assert occupancy(80, registers=32, shared=0, warps=4) == 1.0
    assert occupancy(80, registers=33, shared=0, warps=4) == 0.75  # 40 registers are given: 12 warps of a quarter's 16
    assert occupancy(90, registers=32, shared=0, warps=1) == 0.5  # at most 32 blocks
    assert occupancy(80, registers=32, shared=48 * 1024, warps=4) == 3 * 4 / 64  # of 164 KiB
    assert occupancy(90, registers=32, shared=48 * 1024, warps=4) == 4 * 4 / 64  # of 228 KiB
    assert occupancy(90, registers=255, shared=0, warps=32) == 0  # cannot be launched
