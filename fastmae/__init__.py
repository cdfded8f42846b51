"""fastmae: high-throughput masked-autoencoder pretraining on exactly the reference's arithmetic."""

from fastmae.config import ModelConfig
from fastmae.errors import DataError, DivergedError, InputError
from fastmae.mae import (
    MAE,
    mae_vit_base_patch16,
    mae_vit_huge_patch14,
    mae_vit_large_patch16,
    mae_vit_small_patch16,
    mae_vit_tiny_patch16,
)
from fastmae.masking import Masking, random_masking

__version__ = "0.1.0"

__all__ = [
    "MAE",
    "DataError",
    "DivergedError",
    "InputError",
    "Masking",
    "ModelConfig",
    "mae_vit_base_patch16",
    "mae_vit_huge_patch14",
    "mae_vit_large_patch16",
    "mae_vit_small_patch16",
    "mae_vit_tiny_patch16",
    "random_masking",
]
