"""Keep memory that tensors on the CPU have given back, instead of returning it to the system and asking for it anew.

A step frees and takes gigabytes. By default glibc returns large blocks at once, and the system clears every page of the next
one before it may be used. Source: the GNU C library's manual, section "Malloc Tunable Parameters".
"""

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Tell this process's malloc to keep what is freed, from now on; whether it listens. Peak memory stays as it is."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # not glibc
        return False
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, -1))
