"""Which operations of a block are fused, for each shape: what was measured (``fastmae.model.block.trial``), or named.

Nothing is measured here: without a measurement, as on CPUs, a block computes by torch's own operations.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch

from fastmae.model.config import ModelConfig

_chosen: dict[tuple[str, torch.dtype, torch.dtype, "BlockShape"], tuple[str, ...]] = {}


class BlockShape(NamedTuple):
    """Sizes on which it depends, besides device and dtypes, what is worth fusing in a block."""

    tokens: int
    first: int
    """The first token that attends."""
    dim: int
    heads: int
    hidden: int
    """Width inside the MLP."""

    def __str__(self) -> str:
        attending = f", those from {self.first} on attend" if self.first else ""
        return f"{self.tokens} tokens{attending}, {self.heads} heads, width {self.dim}, MLP {self.hidden}"


def fused_names(wanted: str, device_type: str, dtype: torch.dtype, residual: torch.dtype, shape: BlockShape) -> tuple[str, ...]:
    """The operations of ``config.FUSED`` that a block fuses which computes in ``dtype`` on a ``residual`` stream: those that
    ``wanted`` (``ModelConfig.fused``) names, or those that ``adopt`` was given. Called by torch.compile while it traces."""
    sizes = (len(range(size)) for size in shape)  # constants even in a graph whose batch is dynamic
    return _fused_outside_graph(wanted, device_type, dtype, residual, *sizes)


def _fused_outside_graph(
    wanted: str, device_type: str, dtype: torch.dtype, residual: torch.dtype, *sizes: int
) -> tuple[str, ...]:
    if wanted == "off":
        return ()
    if wanted != "auto":
        return tuple(wanted.split(","))
    return _chosen.get((device_type, dtype, residual, BlockShape(*sizes)), ())


# As torch.compiler.assume_constant_result does, without its import of torch's compiler.
_fused_outside_graph._dynamo_marked_constant = True


def block_shapes(config: ModelConfig, kept: int, predicted: int) -> list[BlockShape]:
    """The blocks of ``training_loss`` with ``kept`` visible and ``predicted`` predicted patches: the encoder's, the decoder's,
    and its last one, of which the predicted patches alone attend."""
    visible, everything = 1 + kept, 1 + kept + predicted
    D, E = config.embed_dim, config.decoder_embed_dim
    hidden, decoder_hidden = int(D * config.mlp_ratio), int(E * config.mlp_ratio)
    encoder = BlockShape(visible, 0, D, config.num_heads, hidden)
    decoder, last = (BlockShape(everything, first, E, config.decoder_num_heads, decoder_hidden) for first in (0, visible))
    return [encoder, last] if config.decoder_depth == 1 else [encoder, decoder, last]


def residual_of(config: ModelConfig, dtype: torch.dtype) -> torch.dtype:
    """The dtype of the residual stream of a model whose products are in ``dtype``, by autocast if that is not float32."""
    return dtype if config.residual == "bf16" else torch.float32


def adopt_fused(
    device_type: str, dtype: torch.dtype, residual: torch.dtype, choices: Mapping[BlockShape, tuple[str, ...]]
) -> None:
    """Use ``choices``, measured here or by rank 0, in all blocks whose ``fused`` is auto."""
    _chosen.update({(device_type, dtype, residual, shape): names for shape, names in choices.items()})
