"""The CUDA runtime that xformers' extension links against, for a torch that brings another one.

A wheel of xformers is built for one version of CUDA (0.0.35: 12.8, next to torch's wheels of that version). Its attention is
torch's own kernels, yet every operator refuses where the extension does not load, and beside a torch of CUDA 13 it does not:
it wants ``libcudart.so.12``. The package ``nvidia-cuda-runtime-cu12`` holds that file, in a folder where no loader looks.
"""

import contextlib
import ctypes
import functools
import importlib.metadata
import json

PACKAGE, LIBRARY = "nvidia-cuda-runtime-cu12", "libcudart.so.12"


@functools.cache
def load_runtime(cuda: str | None) -> str | None:
    """Load what xformers' extension lacks beside a torch of ``cuda``, "13.0" say (None: a torch without CUDA).

    None if it lacks nothing now, else the reason in one line. Imports neither torch nor xformers.
    """
    built = _built_for()
    if cuda is None or built is None or built[0] != 12 or cuda.startswith("12."):
        return None
    for name in (LIBRARY, *_installed()):
        with contextlib.suppress(OSError):
            ctypes.CDLL(name, ctypes.RTLD_GLOBAL)  # global: the extension finds a library by its name once it is loaded
            return None
    version = importlib.metadata.version("xformers")
    return (
        f"xformers {version} needs {LIBRARY}, which a torch of CUDA {cuda} does not bring: pip install {PACKAGE}, or use a "
        f"torch of CUDA {built[0]}.{built[1]}, for which it is built"
    )


def _built_for() -> tuple[int, int] | None:
    """The version of CUDA that the installed xformers states; None where it is missing or has no extension."""
    try:
        stated = importlib.metadata.distribution("xformers").locate_file("xformers/cpp_lib.json").read_text()
        return divmod(json.loads(stated)["version"]["cuda"], 100)
    except (importlib.metadata.PackageNotFoundError, OSError, ValueError, KeyError, TypeError):
        return None


def _installed() -> list[str]:
    """Where the package's own list of files says that the library lies."""
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        return []
    return [str(file.locate()) for file in files if file.name == LIBRARY]
