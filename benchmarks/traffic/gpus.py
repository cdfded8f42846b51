"""GPUs by their makers' data sheets: what the compiler asks of a device, and the rates that a prediction starts from."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class GPU:
    """One GPU. Sources: NVIDIA's data sheets and architecture white papers of A100, H100, H200 and B200."""

    name: str
    """As the driver gives it."""
    capability: tuple[int, int]
    """Compute capability."""
    flops: float
    """Dense bf16 FLOP/s."""
    memory_bytes: float
    """Bytes/s of its memory."""
    memory: int
    """Bytes of it."""
    processors: int
    """Streaming multiprocessors."""
    cache: int
    """Bytes of its level 2 cache."""
    shared_memory: int
    """Bytes of shared memory of a multiprocessor."""
    shared_memory_per_block: int
    """Most bytes of it that a block may ask for."""


_HOPPER = {"capability": (9, 0), "flops": 989e12, "processors": 132, "cache": 50 << 20, "shared_memory": 228 << 10,
           "shared_memory_per_block": 227 << 10}  # fmt: skip
GPUS = {
    "A100": GPU(name="NVIDIA A100-SXM4-80GB", capability=(8, 0), flops=312e12, memory_bytes=2.039e12, memory=80 << 30,
                processors=108, cache=40 << 20, shared_memory=164 << 10, shared_memory_per_block=163 << 10),
    "H100": GPU(name="NVIDIA H100 80GB HBM3", memory_bytes=3.35e12, memory=80 << 30, **_HOPPER),
    "H200": GPU(name="NVIDIA H200", memory_bytes=4.8e12, memory=141 << 30, **_HOPPER),
    "B200": GPU(name="NVIDIA B200", capability=(10, 0), flops=2250e12, memory_bytes=8e12, memory=180 << 30, processors=148,
                cache=126 << 20, shared_memory=228 << 10, shared_memory_per_block=227 << 10),
}  # fmt: skip
