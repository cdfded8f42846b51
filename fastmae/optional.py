"""Packages that one feature needs: imported when it is used, and named with their install command when they are missing."""

import importlib
from types import ModuleType

from fastmae.errors import InputError


def require(module: str, feature: str) -> ModuleType:
    """Import ``module``. Raises InputError that says which ``feature`` needs it and how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise InputError(f"{feature} needs {package}, which cannot be imported ({error}): pip install {package}") from error
