"""Triton kernels of a masked autoencoder, each beside its reference twin in plain torch.

Every op runs its Triton kernel on CUDA tensors and its twin elsewhere; ``FASTMAE_KERNELS=auto|triton|torch`` overrides.

This folder needs torch and triton alone, and nothing of the other folders. To use an op in another program, put it into a
folder ``fastmae`` on Python's path, without an ``__init__.py`` there::

    mkdir -p site/fastmae && ln -s "$PWD/kernels" site/fastmae/kernels
    PYTHONPATH=site python -c "from fastmae.kernels import masked_mse; help(masked_mse)"

An op is the file of its name, and what that imports beside it.
"""

from fastmae.kernels.add_norm import add_norm, add_norm_ref
from fastmae.kernels.decoder_input import decoder_input, decoder_input_ref
from fastmae.kernels.gelu import gelu, gelu_ref
from fastmae.kernels.masked_mse import masked_mse, masked_mse_ref
from fastmae.kernels.patches import gather_patches, gather_patches_ref
from fastmae.kernels.philox import philox4x32, uniform
from fastmae.kernels.random_masking import random_masking, random_masking_ref
from fastmae.kernels.resized_crop import resized_crop, resized_crop_ref
from fastmae.kernels.short_attention import short_attention, short_attention_ref
from fastmae.kernels.take_rows import take_rows, take_rows_ref

__all__ = [
    "add_norm",
    "add_norm_ref",
    "decoder_input",
    "decoder_input_ref",
    "gather_patches",
    "gather_patches_ref",
    "gelu",
    "gelu_ref",
    "masked_mse",
    "masked_mse_ref",
    "philox4x32",
    "random_masking",
    "random_masking_ref",
    "resized_crop",
    "resized_crop_ref",
    "short_attention",
    "short_attention_ref",
    "take_rows",
    "take_rows_ref",
    "uniform",
]
