"""Optional packages: imported by the feature that needs them; if missing, the error names the install command."""

import importlib
from types import ModuleType

from fastmae.errors import InputError


def require(module: str, feature: str, package: str | None = None) -> ModuleType:
    """Import ``module``. Raises InputError that names the ``feature`` that needs it and how to install it.

    ``package``: what to install, by default the module's first name.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = package or module.partition(".")[0]
        raise InputError(f"{feature} needs {package}, which cannot be imported ({error}): pip install {package}") from error
