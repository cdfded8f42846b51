"""Triton kernels of a masked autoencoder, each beside its plain-torch twin; knows nothing of models.

Every op runs its Triton kernel on CUDA tensors and its twin elsewhere; ``FASTMAE_KERNELS=auto|triton|torch`` overrides.
"""

from fastmae.kernels.masked_mse import masked_mse, masked_mse_ref
from fastmae.kernels.patches import gather_patches, gather_patches_ref
from fastmae.kernels.philox import philox4x32, uniform
from fastmae.kernels.take_rows import take_rows, take_rows_ref

__all__ = [
    "gather_patches",
    "gather_patches_ref",
    "masked_mse",
    "masked_mse_ref",
    "philox4x32",
    "take_rows",
    "take_rows_ref",
    "uniform",
]
