"""Inputs of the kernels that take patches of images."""

import torch

from tests.support.twins import twin

# B, C, H, W, patch, K: squares and not, powers of two and not, one channel to thirteen, one patch to many.
SHAPES = [twin((1, 1, 4, 4, 4, 1)), twin((2, 3, 32, 48, 16, 4)), (2, 3, 28, 42, 14, 3), twin((1, 13, 16, 8, 8, 2)),
          twin((3, 4, 6, 10, 2, 5))]  # fmt: skip


def inputs(B, C, H, W, patch, K, dtype, device):
    L = (H // patch) * (W // patch)
    ids = torch.stack([torch.randperm(L)[:K] for _ in range(B)]).to(torch.int32).to(device)
    if dtype == torch.uint8:
        images = torch.randint(0, 256, (B, C, H, W), dtype=torch.uint8, device=device)
        return images, ids, torch.rand(C, device=device), torch.rand(C, device=device) + 0.1
    return torch.randn(B, C, H, W, device=device).to(dtype), ids, None, None
