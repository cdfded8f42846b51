"""The Triton kernels themselves, run without a GPU: the kernel tests once more, in Triton's interpreter.

A process of its own, because the interpreter is chosen when triton is imported.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[1]
KERNEL_TESTS = ["test_philox", "test_take_rows", "test_patches", "test_masked_mse", "test_decoder_input", "test_random_masking",
                "test_resized_crop"]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", KERNEL_TESTS)
def test_kernels_pass_their_tests_in_the_interpreter(name):
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-m", "not gpu", f"tests/{name}.py"],
        env={**os.environ, "TRITON_INTERPRET": "1", "FASTMAE_KERNELS": "triton"},
        cwd=_ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:]
