"""Predicted occupancy: the warps of a kernel that one multiprocessor holds at once, over the most that it can hold.

What limits them is what a block takes of its registers (65,536, given to each quarter in units of 256 a warp), of its shared
memory (in units of 128 bytes, after 1 KiB that each block keeps back) and of its 64 warps and 32 blocks. The counts are those
of compute capabilities 8.0, 9.0 and 10.0 in "Technical Specifications per Compute Capability" of NVIDIA's CUDA C++ Programming
Guide; the units are those of ``cuda_occupancy.h``, which a test compares with. A limit by arithmetic: what a launch reaches
also depends on how many blocks it has.
"""

_REGISTERS, _QUARTERS, _REGISTER_UNIT = 65536, 4, 256  # of a multiprocessor; a warp's registers lie in one quarter
_THREADS, _WARPS, _BLOCKS = 32, 64, 32  # of a warp; of a multiprocessor
_SHARED = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}  # bytes of a multiprocessor
_SHARED_UNIT, _SHARED_RESERVED = 128, 1024  # bytes, per block


def occupancy(target: int, *, registers: int, shared: int, warps: int) -> float:
    """Resident warps over their limit, 0 to 1, of blocks of ``warps`` warps with ``shared`` bytes and ``registers`` per thread.

    ``target`` is the compute capability: 80, 90 or 100. 0 means that not even one block fits.
    """
    of_a_warp = _up(registers * _THREADS, _REGISTER_UNIT)
    by_registers = _REGISTERS // _QUARTERS // of_a_warp * _QUARTERS // warps
    by_shared = _SHARED[target] // _up(shared + _SHARED_RESERVED, _SHARED_UNIT)
    return min(by_registers, by_shared, _WARPS // warps, _BLOCKS) * warps / _WARPS


def _up(value: int, unit: int) -> int:
    """``value`` rounded up to a multiple of ``unit``."""
    return -(-value // unit) * unit
