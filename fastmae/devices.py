"""A device's name, and the peak FLOP/s of its datasheet."""

import platform
import re
from pathlib import Path

import torch

from fastmae.cores import usable_cores

# Dense bf16 TFLOP/s of the makers' datasheets, by the device's full name without the maker's. Others have no MFU.
_DATASHEET = {
    "B200": 2250,
    "H200": 989,
    "H100 80GB HBM3": 989,
    "H100 PCIe": 756,
    "A100-SXM4-40GB": 312,
    "A100-SXM4-80GB": 312,
    "A100-PCIE-40GB": 312,
    "A100 80GB PCIe": 312,
}


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's with its cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = re.search(r"model name\s*: (.+)", text)
    return f"{model[1] if model else platform.machine()} CPU, {usable_cores()} cores"


def datasheet_flops(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s of the datasheet; None where unknown."""
    tera = _DATASHEET.get(device_name(device).removeprefix("NVIDIA "))
    return tera and tera * 1e12
