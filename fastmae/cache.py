"""Where results that cost time are kept between runs: ``FASTMAE_CACHE``, or the user's own cache folder."""

import os
from pathlib import Path


def cache_folder() -> Path | None:
    """``FASTMAE_CACHE``, else ``fastmae`` in ``XDG_CACHE_HOME`` or ``~/.cache``; None where there is no home folder."""
    named = os.environ.get("FASTMAE_CACHE")
    try:
        return Path(named or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "fastmae").expanduser()
    except RuntimeError:  # neither HOME nor an entry for this user
        return None
