"""What tests of benchmarks compile with."""

from functools import partial

import pytest
import torch


@pytest.fixture(params=["aot_eager", pytest.param("inductor", marks=pytest.mark.all)])
def compiler(request, monkeypatch):
    """What torch.compile compiles with: Inductor's own work on CPUs is torch's affair, and takes a minute."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=request.param))
