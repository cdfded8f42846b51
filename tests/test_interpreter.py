"""The Triton kernels themselves, run without a GPU: the kernel tests once more, in Triton's interpreter.

A process of its own, because the interpreter is chosen when triton is imported.
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[1]
KERNEL_TESTS = ["test_resized_crop", "test_masked_mse", "test_random_masking", "test_take_rows", "test_decoder_input",
                "test_patches", "test_philox"]  # fmt: skip


@pytest.fixture(scope="module")
def results():
    """By name, what becomes of each; as many are under way as there are cores, the longest first."""
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        yield {name: threads.submit(run_in_interpreter, name) for name in KERNEL_TESTS}


def run_in_interpreter(name: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-m", "not gpu", f"tests/{name}.py"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1", "FASTMAE_KERNELS": "triton"},
        cwd=_ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", KERNEL_TESTS)
def test_kernels_pass_their_tests_in_the_interpreter(name, results):
    result = results[name].result()
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:]
