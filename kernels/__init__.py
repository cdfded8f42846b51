"""Triton kernels of a masked autoencoder, each beside its reference twin in plain torch.

Every op runs its Triton kernel on CUDA tensors and its twin elsewhere; ``FASTMAE_KERNELS=auto|triton|torch`` overrides.
"""

from fastmae.kernels.decoder_input import decoder_input, decoder_input_ref
from fastmae.kernels.masked_mse import masked_mse, masked_mse_ref
from fastmae.kernels.patches import gather_patches, gather_patches_ref
from fastmae.kernels.philox import philox4x32, uniform
from fastmae.kernels.random_masking import random_masking, random_masking_ref
from fastmae.kernels.resized_crop import resized_crop, resized_crop_ref
from fastmae.kernels.short_attention import short_attention, short_attention_ref
from fastmae.kernels.take_rows import take_rows, take_rows_ref

__all__ = [
    "decoder_input",
    "decoder_input_ref",
    "gather_patches",
    "gather_patches_ref",
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
