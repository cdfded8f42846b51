"""Keep memory that tensors on the CPU have freed, instead of returning it to the system and allocating it again.

A step frees and takes gigabytes. By default glibc returns large blocks at once, and the system clears every page of the next
one before it may be used. Source: the GNU C library's manual, section "Malloc Tunable Parameters".
"""

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Have this process's malloc keep what is freed; whether it does. Peak memory does not change."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # not glibc
        return False
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, -1))
