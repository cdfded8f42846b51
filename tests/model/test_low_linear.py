"""The product that makes a weight's gradient: which one a GPU is given, by tensors without memory."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastmae.model.block.low_linear import _product


class Calls(TorchDispatchMode):
    """Names of the operations that are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_only_float32_is_written_by_a_product_in_low_precision(low, dtype):
    """torch refuses to write another dtype than float32 or that of the factors."""
    with FakeTensorMode(), Calls() as calls:
        grad, x = (torch.empty(10, width, dtype=low, device="cuda") for width in (16, 8))
        found = _product(grad.t(), x, dtype)
    assert found.dtype == dtype and found.shape == (16, 8) and found.is_contiguous()
    assert ("aten.mm.dtype" in calls.names) == (dtype == torch.float32)
