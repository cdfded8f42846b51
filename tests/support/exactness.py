"""The tolerance of every arithmetic test, as a formula: twice torch's own error in the same dtype, plus one ulp."""

import torch


def assert_as_exact_as_torch(found, torch_says, exact):
    """``found`` is at most twice as far from the float64 ``exact`` as ``torch_says`` (same dtype), plus one ulp."""
    assert found.dtype == torch_says.dtype and found.shape == exact.shape
    ulp = torch.finfo(found.dtype).eps * exact.abs().max()
    own = (torch_says.double() - exact).abs().max()
    error = (found.double() - exact).abs().max()
    assert error <= 2 * own + ulp, f"error {error:.3e}, torch's own {own:.3e}, one ulp {ulp:.3e}"
