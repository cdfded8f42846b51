"""fastmae: high-throughput masked-autoencoder pretraining on exactly the reference's arithmetic.

Names are imported from their files when they are first used: `import fastmae` costs nothing, and no torch.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # what type checkers and editors read
    from fastmae.errors import DataError, DivergedError, InputError
    from fastmae.model.config import ModelConfig
    from fastmae.model.mae import (
        MAE,
        mae_vit_base_patch16,
        mae_vit_huge_patch14,
        mae_vit_large_patch16,
        mae_vit_small_patch16,
        mae_vit_tiny_patch16,
    )
    from fastmae.model.masking import Masking, random_masking
    from fastmae.model.weights import load_model

__version__ = "0.1.0"

__all__ = [
    "MAE",
    "DataError",
    "DivergedError",
    "InputError",
    "Masking",
    "ModelConfig",
    "load_model",
    "mae_vit_base_patch16",
    "mae_vit_huge_patch14",
    "mae_vit_large_patch16",
    "mae_vit_small_patch16",
    "mae_vit_tiny_patch16",
    "random_masking",
]

_FILES = {"DataError": "errors", "DivergedError": "errors", "InputError": "errors", "Masking": "model.masking",
          "ModelConfig": "model.config", "load_model": "model.weights", "random_masking": "model.masking"}  # fmt: skip

_MODULES = ("errors", "kernels", "model")  # attributes, too, without an import of their own

if not TYPE_CHECKING:  # where a type checker would take any name for one

    def __getattr__(name: str) -> object:
        """A name of ``__all__`` from its file, ``model.mae`` where ``_FILES`` says no other, or a module (PEP 562)."""
        if name in _MODULES:
            return importlib.import_module(f"{__name__}.{name}")
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        found = getattr(importlib.import_module(f"{__name__}.{_FILES.get(name, 'model.mae')}"), name)
        globals()[name] = found
        return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
