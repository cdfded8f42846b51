"""Training from Python, as the command line does it.

    from fastmae.train.api import Run, pretrain, reference_l
    folder = pretrain(reference_l(), Run(data="shards", out=Path("run"), batch_size=512))

Under torchrun or srun every rank makes the same call.
"""

from fastmae.train.config.recipes import (
    RECIPES,
    Recipe,
    paper_b,
    paper_h,
    paper_l,
    reference_b,
    reference_h,
    reference_l,
)
from fastmae.train.config.run import Run
from fastmae.train.pretrain.pretrain import pretrain

__all__ = ["RECIPES", "Recipe", "Run", "paper_b", "paper_h", "paper_l", "pretrain", "reference_b", "reference_h", "reference_l"]
