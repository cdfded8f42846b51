"""``step``: a training step of ViT-B, L and H by the reference, its best rival and fastmae, in one run.

Each contender has a process of its own. Losses on equal weights, images and noise must be equal before anything is timed; then
they run in turns. Utilisation counts the official work (``fastmae.model.flops``), whatever a contender skips or repeats.
"""

import contextlib
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from fastmae.benchmarks import peers
from fastmae.benchmarks.machine import matmul_flops
from fastmae.benchmarks.timing import Times, check_losses
from fastmae.benchmarks.training.contenders import MASK_RATIO, NAMES, Workload, choose, make
from fastmae.benchmarks.training.gradients import check_gradients
from fastmae.benchmarks.training.reference import load_reference
from fastmae.benchmarks.training.worker import OutOfMemory, Worker, losses_of, take_turns
from fastmae.devices import datasheet_flops
from fastmae.model.config import preset
from fastmae.model.flops import training_flops

_SWEEP = [256, 64, 1024, 128, 512]  # images per step; the most informative first, as time may run out
_PROFILED = 3  # steps
_ORDER = (*NAMES, *peers.NAMES)

Check = Callable[[], list[str]]  # raises LossesDiffer, or returns notes


def measure_steps(models: list[str], batches: list[int] | None, device: torch.device, *, clone: Path | None = None,
                  rounds: int = 5, minutes: float = 9.0, image_size: int = 224, contenders: Sequence[str] = NAMES,
                  compile: str = "auto", profile: bool = False, crossmae: Path | None = None) -> dict[str, object]:  # fmt: skip
    """The section ``step`` of a result: ceilings, and a row for each model, batch and contender.

    ``batches`` None: a sweep up to what fits in memory on a GPU, 16 on a CPU. A further batch is skipped if it would not end
    within ``minutes``. ``compile``: what the rival and fastmae compile on a GPU. ``profile``: rows hold ``profile``, where the
    device's time goes (``kinds``). ``contenders`` may hold ``peers.NAMES``, of which ``crossmae`` needs the clone of that name.
    Raises InputError on an unknown model, a wrong clone, or if a peer's package is missing, LossesDiffer if losses do, or
    fastmae's gradients once compiled.
    """
    peers.check_peers(contenders, crossmae)
    if clone is not None:
        load_reference(clone)
    on_gpu = device.type == "cuda"
    batches = batches or (_SWEEP if on_gpu else [16])
    began, longest, rows = time.monotonic(), 0.0, []
    notes = ["MFU and share of the matrix products' measured rate count the official work of the model, done or skipped"]
    ceilings = {"matmul_flops": matmul_flops(device), "datasheet_flops": datasheet_flops(device)}
    for name in models:
        config = preset(name, norm_pix_loss=True, img_size=image_size)
        check = None
        if on_gpu and "fastmae" in contenders:  # on CPUs nothing is compiled
            choose(config, device, compile)  # here, because the contenders compile beside each other
            mode = "blocks" if compile == "blocks" else "model"
            check = partial(check_gradients, name, batches[0], device, image_size=image_size, mode=mode)
        too_large: dict[str, int] = {}
        for batch in batches:
            started = time.monotonic()
            alive = [n for n in _ORDER if n in contenders and batch < too_large.get(n, batch + 1)]
            if not alive:
                continue
            if rows and started - began + 1.5 * longest > 60 * minutes:
                notes.append(f"{name} at batch {batch}: skipped, would not fit into {minutes:g} minutes")
                continue
            workload = Workload(name=name, config=config, batch=batch, device=device, clone=clone, crossmae=crossmae,
                                compile=compile)  # fmt: skip
            found, failed = _compare(workload, alive, rounds, ceilings, profile, check)
            rows, notes, check = rows + found, notes + failed, None
            too_large |= dict.fromkeys(set(alive) - {r["contender"] for r in found}, batch)
            longest = max(longest, time.monotonic() - started)
    rows.sort(key=lambda r: (models.index(r["model"]), r["batch"], _ORDER.index(r["contender"])))
    descriptions = (f"{r['contender']}: {r['description']}" for r in rows if r["contender"] in peers.NAMES)
    notes += dict.fromkeys(descriptions)
    if not on_gpu and set(contenders) & set(peers.NAMES):
        notes.append("peak memory on a CPU is the process's, with the packages that a contender imports")
    return {"ceilings": ceilings, "rows": rows, "notes": notes}


def _compare(workload: Workload, names: list[str], rounds: int, ceilings: dict, profile: bool,
             check: Check | None) -> tuple[list[dict], list[str]]:  # fmt: skip
    """Rows of those that work, and a line for each that does not fit or fails, and of what ``check`` found first."""
    notes: list[str] = []
    try:
        return _side_by_side(workload, names, rounds, ceilings, {}, profile, check, notes), notes
    except (OutOfMemory, RuntimeError) as error:
        notes = [f"{workload.name} at batch {workload.batch}: measured one after the other, side by side failed: {error}"]
    notes += check() if check else []
    rows, losses = [], {}
    for name in names:
        try:
            rows += _side_by_side(workload, [name], rounds, ceilings, losses, profile, None, notes)
        except (OutOfMemory, RuntimeError) as error:
            notes.append(f"{name}, {workload.name} at batch {workload.batch}: {error}")
    return rows, notes


def _side_by_side(workload: Workload, names: list[str], rounds: int, ceilings: dict,
                  losses: dict[str, tuple[float, float]], profile: bool, check: Check | None,
                  notes: list[str]) -> list[dict]:  # fmt: skip
    """Rows of ``names``, timed in turns. ``losses`` holds those of earlier ones, and gets these; ``notes`` gets those of
    ``check``, which runs while they compile."""
    with contextlib.ExitStack() as stack:
        builds = {n: partial(peers.make_peer if n in peers.NAMES else make, n, workload) for n in names}
        workers = {n: stack.enter_context(Worker(build, workload.device)) for n, build in builds.items()}
        for worker in workers.values():
            worker.ask_losses(7)
        lacks_memory = bool(check and check())
        losses |= losses_of(workers, 7)
        notes += check() if lacks_memory else []  # now without the others beside it
        check_losses(losses, workload.device, peers.OTHER_LOSS)
        times = take_turns(workers, workload.device, rounds)
        memory = {n: w.peak_memory() for n, w in workers.items()}
        more = {n: {"description": w.description()} | ({"profile": w.profile(_PROFILED)} if profile else {})
                for n, w in workers.items()}  # fmt: skip
        return [_row(n, workload, times, memory, losses[n], ceilings) | more[n] for n in workers]


def _row(name: str, workload: Workload, times: dict[str, Times], memory: dict[str, int], loss: tuple[float, float],
         ceilings: dict) -> dict[str, object]:  # fmt: skip
    own = times[name]
    rate = workload.batch / own.median
    flops = rate * training_flops(workload.config, MASK_RATIO)
    does_official_work = name not in peers.OTHER_LOSS
    row = {
        "model": workload.name,
        "image_size": workload.config.img_size[0],
        "mask_ratio": MASK_RATIO,
        "batch": workload.batch,
        "contender": name,
        "images_per_second": rate,
        "milliseconds": 1e3 * own.median,
        "spread": own.spread,
        "rounds": [1e3 * s for s in own.seconds],
        "share_of_matmul": flops / ceilings["matmul_flops"] if does_official_work else None,
        "mfu": flops / ceilings["datasheet_flops"] if ceilings["datasheet_flops"] and does_official_work else None,
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
    """The section's table."""
    head = ["model", "batch", "contender", "images/s", "ms", "spread", "of matmul", "MFU", "GiB", "x reference", "x rival"]
    lines = [head]
    for r in section["rows"]:
        shares = [f"{r[k]:.1%}" if r[k] else "-" for k in ("share_of_matmul", "mfu")]
        speeds = [f"{r[k]:.2f}" if k in r else "-" for k in ("speed_over_reference", "speed_over_rival")]
        rate = f"{r['images_per_second']:.{2 if r['images_per_second'] < 100 else 0}f}"
        lines.append([r["model"], str(r["batch"]), r["contender"], rate, f"{r['milliseconds']:.1f}", f"{r['spread']:.1%}",
                      *shares, f"{r['peak_memory'] / 2**30:.2f}", *speeds])  # fmt: skip
    return lines


def profiles(section: dict) -> dict[str, object]:
    """The section ``profile`` of a result, from the rows of a profiled ``step``."""
    rows = [{k: r[k] for k in ("model", "batch", "contender")} | r.pop("profile") for r in section["rows"] if "profile" in r]
    return {"rows": rows, "notes": ["a kernel that does several things counts for the first of these kinds that it serves"]}
