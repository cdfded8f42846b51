"""``step``: a training step of ViT-B, L and H by the reference, its best rival and fastmae, in one run.

Each contender has a process of its own. Equal losses on equal weights, images and noise are asserted before anything is timed;
then they run in turns.
Utilisation counts the official work (``fastmae.flops``), whatever a contender leaves out or repeats.
"""

import contextlib
import time
from functools import partial
from pathlib import Path

import torch

from fastmae.benchmarks.contenders import MASK_RATIO, NAMES, Workload, make
from fastmae.benchmarks.machine import datasheet_flops, matmul_flops
from fastmae.benchmarks.timing import Times, interleave
from fastmae.benchmarks.worker import OutOfMemory, Worker
from fastmae.config import preset
from fastmae.errors import InputError
from fastmae.flops import training_flops

FP32_TOLERANCE, LOW_TOLERANCE = 1e-5, 1e-2  # relative difference of losses, in float32 and in the precision that is timed


def measure_steps(models: list[str], batches: list[int] | None, device: torch.device, *, clone: Path | None = None,
                  rounds: int | None = None, minutes: float = 9.0, image_size: int = 224) -> dict[str, object]:  # fmt: skip
    """The section ``step`` of a result: ceilings, and a row for each model, batch and contender.

    ``batches`` None: a sweep up to what memory holds on a GPU, 16 on a CPU. A further batch is not begun if it would not end
    within ``minutes``. Raises InputError on an unknown model, AssertionError if losses differ.
    """
    on_gpu = device.type == "cuda"
    batches = batches or ([64, 128, 256, 512, 1024] if on_gpu else [16])
    rounds = rounds or 5
    began, longest, rows, notes = time.monotonic(), 0.0, [], []
    ceilings = {"matmul_flops": matmul_flops(device), "datasheet_flops": datasheet_flops(device)}
    for name in models:
        config = preset(name, norm_pix_loss=True, img_size=image_size)
        alive = list(NAMES)
        for batch in batches:
            started = time.monotonic()
            if rows and started - began + longest > 60 * minutes:
                notes.append(f"{name} at batch {batch} was left out: {minutes:g} minutes would not have been enough")
                continue
            workload = Workload(name=name, config=config, batch=batch, device=device, clone=clone)
            found, lost = _compare(workload, alive, rounds, ceilings)
            rows += found
            for contender, reason in lost.items():
                notes.append(f"{contender}, {name} at batch {batch}: {reason}")
                alive.remove(contender)
            longest = max(longest, time.monotonic() - started)
            if not alive:
                break
    return {"ceilings": ceilings, "rows": rows, "notes": notes}


def check_losses(found: dict[str, tuple[float, float]]) -> None:
    """Raise AssertionError unless all losses, (float32, as timed), are the first one's float32 loss within the tolerances."""
    expected = next(iter(found.values()))[0]
    for name, (exact, timed) in found.items():
        assert abs(exact - expected) <= FP32_TOLERANCE * expected, f"{name} computes another loss, {exact}, not {expected}"
        assert abs(timed - expected) <= LOW_TOLERANCE * expected, f"{name} trains on another loss, {timed}, not {expected}"


def _compare(workload: Workload, names: list[str], rounds: int, ceilings: dict) -> tuple[list[dict], dict[str, str]]:
    """Rows for the contenders that fit into memory, and why the others do not."""
    on_gpu, lost = workload.device.type == "cuda", {}
    with contextlib.ExitStack() as stack:
        workers = {n: stack.enter_context(Worker(partial(make, n, workload), workload.device)) for n in names}
        losses = {n: w.losses(workload.images(4).cpu(), 7) for n, w in workers.items()}
        check_losses(losses)
        for name in names:
            try:
                workers[name].seconds(6 if on_gpu else 1)
            except OutOfMemory as error:
                lost[name] = str(error)
                workers.pop(name).__exit__()  # makes room for the others
        times = interleave({n: w.seconds for n, w in workers.items()}, rounds=rounds, calls=5 if on_gpu else 1, warm_up=1)
        memory = {n: w.peak_memory() for n, w in workers.items()}
        rows = [_row(n, workload, times, memory, losses[n], ceilings) | {"description": w.description()}
                for n, w in workers.items()]  # fmt: skip
    return rows, lost


def _row(name: str, workload: Workload, times: dict[str, Times], memory: dict[str, int], loss: tuple[float, float],
         ceilings: dict) -> dict[str, object]:  # fmt: skip
    own = times[name]
    rate = workload.batch / own.median
    flops = rate * training_flops(workload.config, MASK_RATIO)
    row = {
        "model": workload.name,
        "batch": workload.batch,
        "contender": name,
        "images_per_second": rate,
        "milliseconds": 1e3 * own.median,
        "spread": own.spread,
        "rounds": [1e3 * s for s in own.seconds],
        "share_of_matmul": flops / ceilings["matmul_flops"],
        "mfu": flops / ceilings["datasheet_flops"] if ceilings["datasheet_flops"] else None,
        "peak_memory": memory[name],
        "loss_fp32": loss[0],
        "loss_timed": loss[1],
    }
    for other in ("reference", "rival"):
        if other in times:
            row[f"speed_over_{other}"] = own.over(times[other])
            row[f"memory_over_{other}"] = memory[name] / memory[other]
    return row


def table(section: dict) -> list[list[str]]:
    """The section's rows for people."""
    head = ["model", "batch", "who", "images/s", "ms", "spread", "of matmul", "MFU", "GiB", "x reference", "x rival"]
    lines = [head]
    for r in section["rows"]:
        mfu = f"{r['mfu']:.1%}" if r["mfu"] else "-"
        speeds = [f"{r[k]:.2f}" if k in r else "-" for k in ("speed_over_reference", "speed_over_rival")]
        rate = f"{r['images_per_second']:.{2 if r['images_per_second'] < 100 else 0}f}"
        lines.append([r["model"], str(r["batch"]), r["contender"], rate, f"{r['milliseconds']:.1f}", f"{r['spread']:.1%}",
                      f"{r['share_of_matmul']:.1%}", mfu, f"{r['peak_memory'] / 2**30:.2f}", *speeds])  # fmt: skip
    return lines


def check_models(models: list[str], clone: Path | None) -> None:
    """Raise InputError on a model that cannot be compared."""
    known = ("base", "large", "huge") if clone else ("tiny", "small", "base", "large", "huge")
    for name in models:
        if name not in known:
            raise InputError(f"model must be one of {', '.join(known)}, got {name!r}")
