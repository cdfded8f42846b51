"""The Triton kernels themselves, run without a GPU: the kernel tests once more, in Triton's interpreter.

A process of its own, because the interpreter is chosen when triton is imported. It runs every kind of case once; further shapes
and dtypes of a kind are marked ``twin``, and run in it under ``make test-all``.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[2]
_TESTS = [
    f"tests/kernels/test_{op}.py"
    for op in (
        "add_norm",
        "decoder_input",
        "gelu",
        "masked_mse",
        "patches",
        "philox",
        "random_masking",
        "short_attention",
        "take_rows",
    )
]
_CROPS = ["tests/kernels/test_resized_crop.py"]  # as long as all others together


@pytest.mark.parametrize("files", [_CROPS, _TESTS], ids=["crops", "others"])
@pytest.mark.parametrize("cases", ["not twin", pytest.param("twin", marks=pytest.mark.all)])
def test_kernels_pass_their_tests_in_the_interpreter(files, cases):
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-p", "no:xdist", "-m", f"{cases} and not gpu", *files],
        env={**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1", "FASTMAE_KERNELS": "triton"},
        cwd=_ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:]
