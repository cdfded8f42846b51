"""``loader``: images per second from shards to batches, for its parts, the full loader, and other pipelines, in one run.

    efficiency = speed / (cores x speed of the same work bare, in one process)

With a GPU, also the training step fed from shards beside the same step fed from memory.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

from fastmae.benchmarks.pipelines import BATCH, Bare, Ours, folder_bytes, open_index, reference_loader, webdataset_loader
from fastmae.benchmarks.timing import interleave, synchronize
from fastmae.data.batch import LoaderConfig
from fastmae.data.loader import Loader
from fastmae.model.config import preset
from fastmae.model.mae import MAE
from fastmae.train.step.loss_module import LossModule, MaskedLoss, compiled
from fastmae.train.step.optimizer import make_optimizer, parameter_groups
from fastmae.train.step.step import MicroBatch, Step

_BATCHES = 6  # per turn
_WARM_UP_STEPS = 8
_STEPS = 40

# name -> (what it is compared with, whether it uses all cores)
_ROWS = {
    "indexed reads": (None, False),
    "bare decode": (None, False),
    "bare decode + crop": (None, False),
    "fastmae, crop on the device": ("bare decode", True),
    "fastmae, crop on the CPU": ("bare decode + crop", True),
    "Pillow as the reference, bare": (None, False),
    "Pillow as the reference, DataLoader": ("Pillow as the reference, bare", True),
    "webdataset + DataLoader": (None, True),
}


def measure_loader(data: Path, originals: Path | None, workers: int, rounds: int | None,
                   minutes: float | None = None) -> dict[str, object]:  # fmt: skip
    """The section ``loader`` of a result: a row for each pipeline.

    ``data``: a folder of shards; ``originals``: of the original images, for the reference's pipeline, by default ``data``.
    ``rounds``: turns of each pipeline, at most as many as fit into ``minutes``; one of the two may be None.
    """
    with tempfile.TemporaryDirectory() as scratch:
        index = open_index(data, Path(scratch, "data"))
        originals_index = open_index(originals, Path(scratch, "originals")) if originals else index
        bare, others = Bare(index), Bare(originals_index)
        ours = {"fastmae, crop on the device": Ours(index, workers, on_device=True),
                "fastmae, crop on the CPU": Ours(index, workers, on_device=False)}  # fmt: skip
        runs = {
            "indexed reads": bare.read,
            "bare decode": bare.decode,
            "bare decode + crop": bare.crop,
            **ours,
            "Pillow as the reference, bare": others.pillow,
            "Pillow as the reference, DataLoader": reference_loader(originals_index, workers),
            "webdataset + DataLoader": webdataset_loader(index, workers),
        }
        total = None if rounds is None else (1 + rounds) * len(runs)  # turns, warm-up included
        with tqdm(total=total, unit="turn", dynamic_ncols=True, delay=0.2) as bar:
            shown = {name: _shown(run, name, bar) for name, run in runs.items()}
            times = interleave(
                shown, rounds=rounds, calls=_BATCHES, warm_up=1, seconds=None if minutes is None else 60 * minutes
            )
        rows = []
        for name, (baseline, uses_all) in _ROWS.items():
            speed = BATCH / times[name].median
            used = workers if uses_all else 1
            row = {"pipeline": name, "processes": used, "images_per_second": speed, "spread": times[name].spread,
                   "images_per_second_per_core": speed / used}  # fmt: skip
            source = originals_index if name.startswith("Pillow") else index
            row["megabytes_per_second"] = speed * folder_bytes(source) / 1e6
            if baseline:
                row["efficiency"] = times[name].over(times[baseline]) / used
            if uses_all:
                row["per_core_over_reference"] = times[name].over(times["Pillow as the reference, bare"]) / used
            if name in ours:
                row["main_thread_milliseconds"] = 1e3 * statistics.median(ours[name].cpu_seconds)
            rows.append(row)
        notes = [
            f"{len(index)} images of {folder_bytes(index) / 1e3:.0f} kB on average, batches of {BATCH}, crops of 224 px",
            f"{len(next(iter(times.values())).seconds)} turns of {_BATCHES} batches for each pipeline",
            f"the reference's pipeline reads {len(originals_index)} images of {folder_bytes(originals_index) / 1e3:.0f} kB",
        ]
    return {"rows": rows, "workers": workers, "batch": BATCH, "notes": notes}


def _shown(run: Callable[[int], float], name: str, bar: tqdm) -> Callable[[int], float]:
    """``run``, with its name beside ``bar`` while it is timed."""

    def timed(calls: int) -> float:
        bar.set_postfix_str(name)
        seconds = run(calls)
        bar.update()
        return seconds

    return timed


def measure_fed_step(model: str, data: Path, batch: int, workers: int, device: torch.device, crop: str = "auto",
                     steps: int = _STEPS, image_size: int = 224) -> dict[str, object]:  # fmt: skip
    """The section ``fed step``: a training step with batches from shards, beside the same step with one batch in memory."""
    config = preset(model, norm_pix_loss=True, img_size=image_size)
    network = MAE(config).to(device)
    optimizer = make_optimizer(parameter_groups(network, 0.05), (0.9, 0.95))
    loss = MaskedLoss(patch_size=config.patch_size, mask_ratio=0.75, seed=0)
    autocast = torch.bfloat16 if device.type == "cuda" else None
    step = Step(compiled(LossModule(network), "auto"), optimizer, loss, autocast=autocast)
    loader = Loader(data, LoaderConfig(image_size=config.img_size, workers=workers, crop=crop), batch_size=batch, device=device)
    source = iter(loader)
    waits: list[float] = []

    def fed() -> MicroBatch:
        began = time.perf_counter()
        found = next(source)
        waits.append(time.perf_counter() - began)
        return MicroBatch(found.images, found.sample_ids, found.epochs)

    kept = MicroBatch(*(t.clone() for t in fed()))
    seconds = {}
    for name, take in (("from memory", lambda: kept), ("from shards", fed), ("from memory again", lambda: kept)):
        for _ in range(min(_WARM_UP_STEPS, steps)):
            step([take()], 1e-4)
        synchronize(device)
        waits.clear()
        began = time.perf_counter()
        for _ in range(steps):
            step([take()], 1e-4)
        synchronize(device)
        seconds[name] = (time.perf_counter() - began) / steps
        if name == "from shards":
            asked = sum(waits) / steps
    source.close()
    alone = statistics.mean((seconds["from memory"], seconds["from memory again"]))
    rows = [{"fed": name, "images_per_second": batch / s, "milliseconds": 1e3 * s} for name, s in seconds.items()]
    waiting = max(0.0, 1 - alone / seconds["from shards"])
    notes = [
        f"{model}, batch {batch}, {workers} workers, cropped on the {loader.crop}: {waiting:.1%} of a step is spent waiting "
        f"for data (against the same step from memory); {1e3 * asked:.1f} ms per step in next(loader)"
    ]
    return {"rows": rows, "model": model, "batch": batch, "workers": workers, "crop": loader.crop, "waiting": waiting,
            "asking_milliseconds": 1e3 * asked, "notes": notes}  # fmt: skip


def table(section: dict) -> list[list[str]]:
    """The section's table."""
    lines = [["pipeline", "processes", "images/s", "per core", "MB/s", "of bare", "per core x reference", "main thread, ms"]]
    for r in section["rows"]:
        lines.append(
            [r["pipeline"], str(r["processes"]), f"{r['images_per_second']:.0f}", f"{r['images_per_second_per_core']:.0f}",
             f"{r['megabytes_per_second']:.0f}", *(f"{r[k]:.2f}" if k in r else "" for k in
             ("efficiency", "per_core_over_reference", "main_thread_milliseconds"))]
        )  # fmt: skip
    return lines


def fed_table(section: dict) -> list[list[str]]:
    """The table of ``fed step``."""
    return [["fed", "images/s", "ms per step"],
            *([r["fed"], f"{r['images_per_second']:.1f}", f"{r['milliseconds']:.1f}"] for r in section["rows"])]  # fmt: skip
