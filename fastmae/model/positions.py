"""Fixed two-dimensional sin-cos position table.

    pos[(y, x)] = [sin(x w), cos(x w), sin(y w), cos(y w)],        w_i = 10000**(-i / (D/4)),  i < D/4

A grid of g patches over the same scene as one of G has the coordinates x = (i + 1/2) G / g - 1/2.

The first half of the channels encodes the column, the second the row. Source: facebookresearch/mae ``util/pos_embed.py``
has the same table; swapping the two halves is a known mistake of reimplementations.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

_SAME = 1e-5  # between float32 tables of different programs; those of lower precision are compared after rounding


def sincos_positions(dim: int, grid: tuple[int, int], within: tuple[int, int] | None = None) -> Tensor:
    """Table (1, 1 + L, dim) float32 for a grid of (rows, columns), row-major; row 0, the class token's, is zero.

    ``within``: the grid whose coordinates are used, by default its own. Computed in float64. ``dim`` must be a multiple of 4.
    """
    frequency = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))

    def encode(position: Tensor) -> Tensor:
        angle = position.reshape(-1, 1) * frequency
        return torch.cat([angle.sin(), angle.cos()], dim=1)  # (L, dim / 2)

    rows, columns = (
        (torch.arange(g, dtype=torch.float64) + 0.5) * G / g - 0.5 for g, G in zip(grid, within or grid, strict=True)
    )
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    table = torch.cat([encode(x), encode(y)], dim=1)
    return torch.cat([table.new_zeros(1, dim), table]).float()[None]


def resized(table: Tensor, grid: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """``table`` (1, 1 + L, D) of ``grid`` for another grid over the same scene: the sin-cos table, recognised by its values, is
    computed at the new coordinates; any other is interpolated bicubically, and row 0 kept."""
    dim = table.shape[-1]
    if torch.allclose(table, sincos_positions(dim, grid).to(table), rtol=0, atol=_SAME):
        return sincos_positions(dim, new, grid).to(table)
    patches = table[:, 1:].double().reshape(1, *grid, dim).permute(0, 3, 1, 2)
    patches = F.interpolate(patches, size=new, mode="bicubic").permute(0, 2, 3, 1).reshape(1, -1, dim)
    return torch.cat([table[:, :1], patches.to(table)], dim=1)
