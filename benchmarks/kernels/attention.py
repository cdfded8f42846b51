"""``attention``: every backend on the shapes of training, and which of them ``auto`` chooses."""

import torch

from fastmae.model.attention.backends import Shape
from fastmae.model.attention.choice import fastest, measure
from fastmae.model.attention.dot_product import attention_shapes
from fastmae.model.attention.probe import notes as probe_notes
from fastmae.model.attention.probe import probe, why_not
from fastmae.model.config import BACKENDS, kept_patches, preset

_CPU_TOKENS = 3200  # keys in a measured batch; a GPU's default keeps it busy for about a millisecond


def shapes_of(models: list[str], mask_ratio: float = 0.75) -> list[Shape]:
    """The attention shapes of ``models``, each once."""
    found = []
    for model in models:
        config = preset(model)
        K = kept_patches(config.patches, mask_ratio)
        found += attention_shapes(config, K, config.patches - K)
    return list(dict.fromkeys(found))


def measure_attention(models: list[str], device: torch.device) -> dict[str, object]:
    """The section ``attention`` of a result: a row for each shape and backend, forward and backward."""
    on_gpu = device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    rows, notes = [], []
    shapes = shapes_of(models)
    probe(device.type, dtype, shapes)
    for shape in shapes:
        # First what auto chooses, then the measurement that it is compared with.
        auto = fastest(device.type, dtype, shape) if on_gpu else "sdpa"
        times = measure(device.type, dtype, shape) if on_gpu else measure(device.type, dtype, shape, _CPU_TOKENS)
        best = min(times.values())
        for backend, microseconds in times.items():
            rows.append({"shape": str(shape), **shape._asdict(), "dtype": str(dtype).removeprefix("torch."), "backend": backend,
                         "microseconds": microseconds, "over_best": microseconds / best, "auto": backend == auto})  # fmt: skip
    for backend in BACKENDS:
        reasons = {r for s in shapes if (r := why_not(backend, device.type, dtype, s))}
        notes += [f"{backend} does not work here: {reason}" for reason in sorted(reasons)]
    return {"rows": rows, "notes": notes + probe_notes()}


def table(section: dict) -> list[list[str]]:
    """The section's table."""
    lines = [["shape", "backend", "us", "x best", "auto"]]
    for r in section["rows"]:
        lines.append([r["shape"], r["backend"], f"{r['microseconds']:.0f}", f"{r['over_best']:.2f}", "<-" if r["auto"] else ""])
    return lines
