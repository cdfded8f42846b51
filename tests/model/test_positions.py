"""Position tables: the column in the first half, the row in the second, by the published formula."""

import math

import pytest
import torch

from fastmae.model.positions import sincos_positions


@pytest.mark.parametrize(("dim", "grid"), [(8, (2, 3)), (20, (7, 5)), (768, (14, 14))])
def test_every_entry_follows_the_formula(dim, grid):
    table = sincos_positions(dim, grid)
    assert table.shape == (1, 1 + grid[0] * grid[1], dim) and table.dtype == torch.float32
    assert (table[0, 0] == 0).all()
    quarter = dim // 4
    for y in range(grid[0]):
        for x in range(grid[1]):
            row = table[0, 1 + y * grid[1] + x]
            for i in range(quarter):
                w = 1 / 10000 ** (i / quarter)
                expected = math.sin(x * w), math.cos(x * w), math.sin(y * w), math.cos(y * w)
                assert torch.allclose(row[i::quarter], torch.tensor(expected), rtol=0, atol=1e-6)
