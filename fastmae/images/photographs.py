"""Ten photographs for trials, which come inside scikit-image and scikit-learn (``pip install 'fastmae[demo]'``).

Nothing is downloaded.
"""

import importlib.util
from pathlib import Path

from fastmae.errors import InputError

# Colour photographs of things, not test charts: package, folder inside it, file.
_PHOTOGRAPHS = (
    *(("skimage", "data", f"{name}.png") for name in ("astronaut", "chelsea", "coffee", "ihc", "motorcycle_left")),
    *(("skimage", "data", f"{name}.jpg") for name in ("hubble_deep_field", "retina", "rocket")),
    *(("sklearn", "datasets/images", f"{name}.jpg") for name in ("china", "flower")),
)
_PACKAGES = {"skimage": "scikit-image", "sklearn": "scikit-learn"}


def find_photographs() -> list[Path]:
    """Paths of the photographs inside the installed packages. Raises InputError if there are none."""
    found = []
    for package, folder, name in _PHOTOGRAPHS:
        spec = importlib.util.find_spec(package)
        path = Path(spec.origin).parent / folder / name if spec else None
        if path and path.is_file():
            found.append(path)
    if not found:
        raise InputError(f"the demo's photographs come with {' and '.join(_PACKAGES.values())}: pip install 'fastmae[demo]'")
    return found
