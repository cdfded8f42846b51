"""Freed memory that the process keeps."""

import subprocess
import sys

_SCRIPT = """
import resource, sys, torch
from fastmae.train.step.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
for _ in range(20):  # the heap settles
    torch.ones(2**24)  # 64 MiB
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how):
    result = subprocess.run([sys.executable, "-c", _SCRIPT, how], capture_output=True, text=True, check=True)
    return int(result.stdout)


def test_kept_memory_is_not_asked_for_again():
    assert faults("return") > 10 * max(1, faults("keep"))
