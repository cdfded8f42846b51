"""Packages that one feature needs: imported when it is used, and named with their install command when they are missing."""

import importlib
from types import ModuleType

from fastmae.errors import InputError


def require(module: str, feature: str, package: str | None = None) -> ModuleType:
    """Import ``module``. Raises InputError that says which ``feature`` needs it and how to install it.

    ``package`` is what to install, where that is not the module's first name.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = package or module.partition(".")[0]
        raise InputError(f"{feature} needs {package}, which cannot be imported ({error}): pip install {package}") from error
