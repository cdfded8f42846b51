"""``scaling``: step time, efficiency and hours of 800 epochs on 8 to 512 GPUs. A model with stated parameters, no measurement.

Strong scaling shares one effective batch among more GPUs; weak scaling gives each GPU as many images as before. What is sent
is counted in ``collectives``, what it costs in ``cluster``, what overlaps in ``timeline``.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from fastmae.benchmarks.scaling.cluster import Cluster
from fastmae.benchmarks.scaling.collectives import Layout, sent_bytes, step_collectives
from fastmae.benchmarks.scaling.peers import IMAGES, PEERS
from fastmae.benchmarks.scaling.timeline import Batch, held_bytes, step_time
from fastmae.errors import InputError
from fastmae.model.config import preset
from fastmae.train.config.recipes import reference_b

GPUS = (8, 16, 32, 64, 128, 256, 512)
MODELS = ("base", "large", "huge")
WAYS = (("ddp", "fp32"), ("ddp", "bf16"), ("hsdp", "fp32"), ("hsdp", "bf16"))
_LOADER = "fastmae, crop on the device"  # the pipeline of a GPU run
_SENT_ON = 64  # GPUs of the table of what is sent


def predict_scaling(models: Sequence[str], gpus: Sequence[int], cluster: Cluster, results: Path, *, effective_batch: int = 4096,
                    micro_batch: int = 128) -> dict[str, object]:  # fmt: skip
    """The section ``scaling``: rows of strong and weak scaling, of what is sent, and of the loader's demand.

    ``micro_batch``: most images of a GPU at once, and those of a GPU in weak scaling. ``results``: the folder of committed
    results, where the loader's speed is. Raises InputError on numbers that do not divide.
    """
    strong, weak = [], []
    for model in models:
        for size in gpus:
            images, rest = divmod(effective_batch, size)
            if rest or not images:
                raise InputError(f"effective batch {effective_batch} must be a multiple of the number of GPUs, got {size}")
            strong += _rows(model, size, Batch(images=images, micro_batch=min(images, micro_batch)), cluster)
            weak += _rows(model, size, Batch(images=micro_batch, micro_batch=micro_batch), cluster)
    steps = reference_b().total_steps(IMAGES)
    for row in strong if effective_batch == reference_b().effective_batch else []:
        row["hours_of_800_epochs"] = steps * row["milliseconds"] / 3.6e6
    loader = _loader(weak, cluster, results)
    notes = ["a model, not a measurement: every parameter is stated, and none comes from a committed GPU result"]
    notes += [] if loader else [f"no loader throughput: {results.name} has no loader result"]
    return {"cluster": dataclasses.asdict(cluster), "effective_batch": effective_batch, "micro_batch": micro_batch,
            "strong": strong, "weak": weak, "sent": _sent(models, cluster), "loader": loader,
            "peers": [{**dataclasses.asdict(p), "share": p.share} for p in PEERS], "notes": notes}  # fmt: skip


def layout(how: str, reduce: str, gpus: int, cluster: Cluster) -> Layout:
    """``gpus`` of ``cluster``: full machines or a part of one."""
    machines, rest = divmod(gpus, cluster.gpus_per_machine)
    if machines and rest:
        raise InputError(f"the number of GPUs must be a multiple of gpus_per_machine ({cluster.gpus_per_machine}), got {gpus}")
    return Layout(how=how, reduce=reduce, machines=max(machines, 1), local=min(gpus, cluster.gpus_per_machine))


def _rows(model: str, gpus: int, batch: Batch, cluster: Cluster) -> list[dict]:
    found = []
    for how, reduce in WAYS:
        spread = layout(how, reduce, gpus, cluster)
        time = step_time(preset(model), batch, spread, cluster)
        found.append({
            "model": model, "gpus": gpus, "parallel": how, "reduce": reduce, "images_per_gpu": batch.images,
            "micro_batch": batch.micro_batch, "work_milliseconds": 1e3 * time.work, "gpu_milliseconds": 1e3 * time.gpu,
            "exposed_milliseconds": 1e3 * time.exposed, "copies_milliseconds": 1e3 * time.copies,
            "update_milliseconds": 1e3 * time.update, "launches_milliseconds": 1e3 * time.launches,
            "vote_milliseconds": 1e3 * time.vote, "milliseconds": 1e3 * time.total, "efficiency": time.efficiency,
            "efficiency_without_vote": time.work / time.gpu, "images_per_second": gpus * batch.images / time.total,
            "held_bytes": held_bytes(preset(model), spread, batch.accumulate),
        })  # fmt: skip
    return found


def _sent(models: Sequence[str], cluster: Cluster) -> list[dict]:
    """What each of ``_SENT_ON`` GPUs sends in a step of one micro-batch."""
    found = []
    for model in models:
        for how, reduce in (*WAYS, ("fsdp", "fp32")):
            spread = layout(how, reduce, max(_SENT_ON // cluster.gpus_per_machine, 1) * cluster.gpus_per_machine, cluster)
            sent = [c for c in step_collectives(preset(model), spread) if c.phase != "vote"]
            row = {"model": model, "parallel": how, "reduce": reduce, "gpus": spread.processes, "collectives": len(sent)}
            for kind in ("all_reduce", "all_gather", "reduce_scatter"):
                row[f"{kind}_bytes"] = sum(c.bytes for c in sent if c.kind == kind)
            spans = [(c, *spread.span(c.group)) for c in sent]
            row["sent_bytes"] = sum(sent_bytes(c.kind, c.bytes, m * n) for c, m, n in spans)
            # Of the rings through a machine's n GPUs each leaves it through another card.
            row["card_bytes"] = sum(sent_bytes(c.kind, c.bytes, m * n) / n for c, m, n in spans if m > 1)
            found.append(row)
    return found


def _loader(weak: list[dict], cluster: Cluster, results: Path) -> list[dict]:
    """Each model's demand on a machine's loader at its fastest row, by the newest committed result of the loader."""
    for path in sorted(results.glob("*.json"), reverse=True):
        section = json.loads(path.read_text()).get("loader")
        measured = {r["pipeline"]: r for r in section["rows"]}.get(_LOADER) if section else None
        if not measured:
            continue
        per_core, found = measured["images_per_second_per_core"], []
        bytes_per_image = 1e6 * measured["megabytes_per_second"] / measured["images_per_second"]
        for model in dict.fromkeys(r["model"] for r in weak):
            rate = max(r["images_per_second"] / r["gpus"] for r in weak if r["model"] == model)
            rate *= min(cluster.gpus_per_machine, max(r["gpus"] for r in weak))
            found.append({"model": model, "images_per_second": rate, "cores": rate / per_core,
                          "bytes_per_second": rate * bytes_per_image, "images_per_second_per_core": per_core,
                          "measured_on": section["environment"]["device"], "file": path.name})  # fmt: skip
        return found
    return []
