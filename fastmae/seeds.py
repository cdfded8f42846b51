"""Seeds: the key of the counter-based generator (``kernels/philox.py``), two words of 32 bits."""

import operator

from fastmae.errors import InputError

LARGEST = 2**64 - 1


def check_seed(seed: int) -> int:
    """``seed`` as a plain integer. Raises InputError outside 0..``LARGEST``, beyond which seeds repeat."""
    try:
        number = operator.index(seed)  # numpy's integers too
    except TypeError:
        number = -1
    if not 0 <= number <= LARGEST:
        raise InputError(f"seed must be an integer from 0 to {LARGEST} (64 bits), got {seed!r}")
    return number
