"""A whole model by all of our kernels at once, each in Triton's interpreter, and by their twins."""

import os
import subprocess
import sys
from pathlib import Path

import torch

from fastmae.benchmarks.training.gradients import errors
from tests.support.fused import OURS, PLAIN, model_of, pass_

_CODE = """
import sys, torch
from tests.support.fused import OURS, model_of, pass_
torch.save(pass_(model_of(**OURS, depth=1, decoder_depth=1).float(), images=2), sys.argv[1])
"""


def test_loss_and_every_gradient_by_the_kernels_equal_the_twins(tmp_path):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "FASTMAE_KERNELS": "triton", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", _CODE, str(tmp_path / "found.pt")]
    done = subprocess.run(command, env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = torch.load(tmp_path / "found.pt")
    exact, *others = (pass_(model_of(**fields, depth=1, decoder_depth=1).to(dtype), images=2)
                      for fields, dtype in ((PLAIN, torch.float64), (PLAIN, torch.float32), (OURS, torch.float32)))  # fmt: skip
    assert found.keys() == exact.keys()
    ours, *theirs = (errors(gradients, exact) for gradients in (found, *others))
    for other in theirs:  # torch's own operations, and the twins
        assert [name for name in ours if not ours[name] <= 2 * other[name] + torch.finfo(torch.float32).eps] == []
