"""This checkout as a package for the programs of a report, with nothing installed: a folder of links, and the environment.

The root folders are the layers, and ``fastmae`` joins them (``pyproject.toml``); so does ``site/fastmae`` here. It works with
any Python that has torch, without a network, and beside whatever fastmae is installed.
"""

import os
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LAYERS = ("kernels", "train", "benchmarks")


def link(folder: Path) -> Path:
    """Make this checkout's ``fastmae`` importable from ``folder``; return it."""
    package = folder / "fastmae"
    if package.exists():
        shutil.rmtree(package)  # of links: a file that has gone since would stay
    package.mkdir(parents=True)
    for path in [*(ROOT / "fastmae").iterdir(), *(ROOT / layer for layer in LAYERS)]:
        if path.name != "__pycache__":
            (package / path.name).symlink_to(path)
    return folder


def environment(results: Path) -> dict[str, str]:
    """Of the programs of a report: this checkout, and caches of what is compiled and chosen that later parts find."""
    cache = results / "cache"
    given = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    return {
        **os.environ,
        # The checkout's root last, for tests: the folder fastmae/ in it is not the package.
        "PYTHONPATH": os.pathsep.join([str(link(results / "site")), *given, str(ROOT)]),
        "PYTHONSAFEPATH": "1",
        "PYTHONUNBUFFERED": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
        "TRITON_CACHE_DIR": str(cache / "triton"),
        "FASTMAE_CACHE": str(cache / "fastmae"),
    }
