"""The CUDA runtime that xformers' extension links against, for a torch that was built for another CUDA.

A wheel of xformers is built for one version of CUDA (0.0.35: 12.8). Its attention calls torch's own kernels, yet every operator
refuses if the extension does not load, and with a torch for CUDA 13 it does not: it needs ``libcudart.so.12``. The package
``nvidia-cuda-runtime-cu12`` has that file, in a folder that the dynamic loader does not search.
"""

import contextlib
import ctypes
import functools
import importlib.metadata
import json

PACKAGE, LIBRARY = "nvidia-cuda-runtime-cu12", "libcudart.so.12"


@functools.cache
def load_runtime(cuda: str | None) -> str | None:
    """Load the runtime that xformers' extension needs, if a torch for ``cuda``, such as "13.0", has another (None: no CUDA).

    None if nothing is missing now, else the reason in one line. Imports neither torch nor xformers.
    """
    built = _built_for()
    if cuda is None or built is None or built[0] != 12 or cuda.startswith("12."):
        return None
    for name in (LIBRARY, *_installed()):
        with contextlib.suppress(OSError):
            ctypes.CDLL(name, ctypes.RTLD_GLOBAL)  # global: a loaded library is found by its name
            return None
    version = importlib.metadata.version("xformers")
    return (
        f"xformers {version} needs {LIBRARY}, which a torch for CUDA {cuda} does not include: pip install {PACKAGE}, or use a "
        f"torch for CUDA {built[0]}.{built[1]}, for which it is built"
    )


def _built_for() -> tuple[int, int] | None:
    """The CUDA version of the installed xformers; None if it is missing or has no extension."""
    try:
        stated = importlib.metadata.distribution("xformers").locate_file("xformers/cpp_lib.json").read_text()
        return divmod(json.loads(stated)["version"]["cuda"], 100)
    except (importlib.metadata.PackageNotFoundError, OSError, ValueError, KeyError, TypeError):
        return None


def _installed() -> list[str]:
    """Paths of the library in the installed package."""
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        return []
    return [str(file.locate()) for file in files if file.name == LIBRARY]
