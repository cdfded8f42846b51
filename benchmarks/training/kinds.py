"""Where a step's time on the device goes: kernels by what they do, from torch's profiler.

A kernel's kind is that of the first rule that its name matches: names of cuBLAS, cuDNN, CUTLASS, flash attention, PyTorch's
own kernels, those that Inductor generates (``triton_red_fused_native_layer_norm_...``), ours, and torch's operators. A kernel
of Inductor that does several things counts for the first of them in the order of the rules. ``fastmae.benchmarks.traffic``
predicts a step's time by the same kinds.
"""

import json
import re
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity

from fastmae.benchmarks.timing import seconds_per_call, synchronize

KINDS = ("products", "attention", "norms", "GELU", "bias gradients", "casts", "concatenation", "copies", "fastmae ops",
         "optimizer", "communication", "other")  # fmt: skip
_LISTED = 40  # kernels in a result, the longest ones

# What Inductor names after views, casts and concatenations alone moves memory and computes nothing; after sums besides, and the
# backward pass that it repeats for one, it adds up a gradient's columns.
_VIEWS = ("view|_?unsafe_view|reshape|permute|transpose|t|clone|copy|slice|select|squeeze|unsqueeze|expand|split|unbind"
          "|split_with_sizes")  # fmt: skip
_CASTS, _JOINS = "_?to_copy|convert_element_type", "cat|stack"


def _named_after(operators: str, but: str = "") -> str:
    """A kernel of Inductor that is named after one of ``operators``, and besides after these, views and ``but`` alone."""
    others = "|".join(filter(None, (operators, _VIEWS, but)))
    return rf"^triton_(poi|red|per)_fused_+(?=(.*_)?({operators})_)(({others})_+)+\d+$"


# Attention first: its kernels are built of CUTLASS and cuDNN too. Norms before copies: Inductor fuses casts into them.
_RULES = tuple(
    (kind, re.compile(pattern, re.IGNORECASE))
    for kind, pattern in (
        ("communication", r"nccl|all_?reduce|all_?gather|reduce_?scatter"),
        ("attention", r"flash|fmha|sdpa|sdp_|scaled_dot_product|efficient_attention|softmax|mha_|short_attention"),
        ("casts", r"foreach_copy|multi_tensor_apply.*\bCopy"),
        ("optimizer", r"multi_tensor_apply|adam|amp_(update|foreach)|foreach"),
        ("products", r"gemm|nvjet|cutlass|xmma|splitk|cublas|wgmma|gemv|convol|implicit_con|dgrad|wgrad|fprop|triton_(tem|mm)_"
                     r"|aten::(add)?(mm|bmm)\b|linear"),
        ("bias gradients", _named_after("sum", f"{_CASTS}|{_JOINS}|gelu|gelu_backward") + "|sum_functor|aten::sum$"),
        ("norms", r"layer_?norm|gammabeta|batch_?norm|rms_?norm|add_norm"),
        ("GELU", r"gelu"),
        ("fastmae ops", r"masked_mse|gather_patches|take_rows|sum_holes|decoder_input|random_masking|resized_crop"),
        ("concatenation", _named_after(_JOINS, _CASTS) + "|CatArray|aten::(cat|stack)$"),
        ("casts", _named_after(_CASTS) + "|float16_copy|aten::_to_copy$"),
        ("copies", _named_after(_VIEWS) + r"|memcpy|memset|copy_kernel|nchwToNhwc|nhwcToNchw|FillFunctor"
                   r"|aten::(copy_|clone|contiguous|zero_|fill_|zeros)$"),
    )
)  # fmt: skip


def kind_of(name: str) -> str:
    """One of ``KINDS``, for a kernel's or an operator's name."""
    return next((kind for kind, pattern in _RULES if pattern.search(name)), "other")


def profile_calls(call: Callable[[], object], device: torch.device, calls: int) -> dict[str, object]:
    """Time of one of ``calls`` calls: ``kinds``, each with microseconds and launches; ``busy``, their share of the wall clock's
    ``microseconds``, measured without the profiler; and ``kernels``, the longest ones.

    On a CPU the kernels are torch's operators, and their time is self time.
    """
    call()
    microseconds = 1e6 * seconds_per_call(call, device, calls)
    on_gpu = device.type == "cuda"
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity], acc_events=True) as profiler:  # torch 2.11 warns of its default
        for _ in range(calls):
            call()
        synchronize(device)
    if on_gpu:
        with tempfile.TemporaryDirectory() as folder:
            profiler.export_chrome_trace(str(path := Path(folder, "trace.json")))
            times, launches = kernels_of(json.loads(path.read_text(errors="replace")))
    else:
        operators = profiler.key_averages()
        times = Counter({o.key: o.self_cpu_time_total for o in operators})
        launches = Counter({o.key: o.count for o in operators})
    return {"microseconds": microseconds, **summed(times, launches, calls), "busy": sum(times.values()) / calls / microseconds}


def kernels_of(trace: dict) -> tuple[Counter, Counter]:
    """Microseconds and launches of each kernel and copy on the device in a Chrome trace, without user annotations."""
    times, launches = Counter(), Counter()
    for event in trace["traceEvents"]:
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            times[event["name"]] += event["dur"]
            launches[event["name"]] += 1
    return times, launches


def summed(times: Counter, launches: Counter, calls: int) -> dict[str, object]:
    """The kernels of ``calls`` calls, by kind and by name, for one call."""
    total = sum(times.values()) or 1
    kinds = {kind: {"microseconds": 0.0, "launches": 0.0} for kind in KINDS}
    for name, microseconds in times.items():
        kinds[kind_of(name)]["microseconds"] += microseconds / calls
        kinds[kind_of(name)]["launches"] += launches[name] / calls
    for found in kinds.values():
        found["share"] = found["microseconds"] * calls / total
    kernels = [{"name": n[:200], "kind": kind_of(n), "microseconds": t / calls, "launches": launches[n] / calls}
               for n, t in times.most_common(_LISTED)]  # fmt: skip
    return {"kinds": kinds, "kernels": kernels}


def table(section: dict) -> list[list[str]]:
    """The table of ``profile``: a line for each kind, a column for each contender."""
    rows = section["rows"]
    lines = [["ms per step (launches)", *(f"{r['contender']}, {r['model']}, batch {r['batch']}" for r in rows)]]
    for kind in KINDS:
        found = [r["kinds"][kind] for r in rows]
        lines.append([kind, *(f"{f['microseconds'] / 1e3:.2f} ({f['launches']:.0f})" for f in found)])
    lines.append(["total, share of the step", *(f"{r['busy']:.0%}" for r in rows)])
    return lines
