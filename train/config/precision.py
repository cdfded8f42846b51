"""The dtype in which a run computes."""

import torch

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}
"""Autocast's dtype for each precision; None where there is no autocast."""


def precision_of(wanted: str, device_type: str) -> str:
    """What ``wanted``, one of ``modes.PRECISION``, stands for on a device: a key of ``AUTOCAST``."""
    if wanted != "auto":
        return wanted
    return "bf16" if device_type == "cuda" else "fp32"
