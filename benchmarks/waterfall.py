"""``waterfall``: what each optimisation is worth, by switching it off alone in fastmae's step. All run in turns."""

import statistics
import time
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from fastmae.benchmarks.contenders import LR, MASK_RATIO, WEIGHT_DECAY, Contender, Workload, fastmae_contender
from fastmae.benchmarks.equality import check_losses
from fastmae.benchmarks.worker import OutOfMemory, Worker, take_turns
from fastmae.config import preset
from fastmae.errors import InputError
from fastmae.train.compiled import LossModule
from fastmae.train.optimizer import parameter_groups
from fastmae.train.step import Step


@dataclass(frozen=True)
class Switch:
    """One change of the step: arguments of ``fastmae_contender`` and fields of the model's config."""

    name: str
    arguments: dict[str, object] = field(default_factory=dict)
    config: dict[str, object] = field(default_factory=dict)
    devices: tuple[str, ...] = ("cuda", "cpu")
    adds: bool = False
    """An option that is off by default, switched on."""

    def build(self, workload: Workload) -> Contender:
        """The step with this switch thrown."""
        return fastmae_contender(workload, config=replace(workload.config, **self.config), **self.arguments)


class ReferenceCall(LossModule):
    """The model's reference call in place of its fast path: all patches embedded, everything predicted, target stored."""

    def forward(self, images: Tensor, ids_keep: Tensor, ids_predict: Tensor, ids_restore: Tensor) -> Tensor:
        """The loss under the same mask: the places in the shuffled order are a noise that sorts into it."""
        return self.model(images, MASK_RATIO, noise=ids_restore.float())[0]


class PlainUpdate(Step):
    """The step with the AdamW that torch takes when nothing is asked for."""

    def __init__(self, module: nn.Module, optimizer: AdamW, **settings):
        groups = parameter_groups(module, WEIGHT_DECAY)
        super().__init__(module, AdamW(groups, lr=LR, betas=(0.9, 0.95)), **settings)

    def _update(self, is_finite: Tensor, spike: Tensor) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


SWITCHES = (
    Switch("no torch.compile", {"compile": "off"}, devices=("cuda",)),
    Switch("torch.compile of single blocks", {"compile": "blocks"}, devices=("cuda",)),
    Switch("torch.compile of the model", {"compile": "model"}, devices=("cpu",), adds=True),
    Switch("CUDA graph of the step", {"graphs": True}, devices=("cuda",), adds=True),
    Switch("eager twins in place of Triton kernels", {"kernels": "torch"}, devices=("cuda",)),
    Switch("SDPA's math attention", config={"attention": "math"}),
    Switch("torch's choice of attention", config={"attention": "sdpa"}, devices=("cuda",)),
    Switch("no exact skipping", {"loss_module": ReferenceCall}),
    Switch("float images", {"as_bytes": False}),
    Switch("unfused AdamW", {"step_class": PlainUpdate}),
    Switch("torch's own linear layers", {"onednn": False}, devices=("cpu",)),
    Switch("freed memory returned to the system", {"keep_memory": False}, devices=("cpu",)),
    Switch("bf16 residual stream", config={"residual": "bf16"}, devices=("cuda",), adds=True),
    Switch("block checkpointing", config={"checkpointing": True}, adds=True),
)


def measure_waterfall(model: str, batch: int | None, device: torch.device, rounds: int = 5,
                      image_size: int = 224, minutes: float = 9.0) -> dict[str, object]:  # fmt: skip
    """The section ``waterfall`` of a result: the step as it is, and with each switch thrown alone."""
    batch = batch or (256 if device.type == "cuda" else 16)
    config = preset(model, norm_pix_loss=True, img_size=image_size)
    workload = Workload(name=model, config=config, batch=batch, device=device)
    began, longest = time.monotonic(), 0.0
    rows, notes = [{"switch": "fastmae", "adds": False, "speed": 1.0}], []
    with Worker(partial(fastmae_contender, workload), device) as plain:
        losses = {"fastmae": plain.losses(7)}
        for switch in [s for s in SWITCHES if device.type in s.devices]:
            started = time.monotonic()
            if started - began + longest > 60 * minutes:
                notes.append(f"{switch.name} was left out: {minutes:g} minutes would not have been enough")
                continue
            try:
                rows.append(_against(plain, losses, switch, workload, rounds))
            except (OutOfMemory, RuntimeError) as error:
                notes.append(f"{switch.name}: {error}")
            longest = max(longest, time.monotonic() - started)
        rows[0] |= {"peak_memory": plain.peak_memory()}
    if len(rows) == 1:
        raise InputError(f"no switch could be measured: {'; '.join(notes)}")
    rates = [r["fastmae_images_per_second"] for r in rows[1:]]
    middle = statistics.median(rates)
    rows[0] |= {"images_per_second": middle, "spread": (max(rates) - min(rates)) / middle}
    for row in rows:
        row["memory"] = row["peak_memory"] / rows[0]["peak_memory"]
    return {"model": model, "image_size": image_size, "batch": batch, "rows": rows, "notes": notes}


def _against(plain: Worker, losses: dict[str, tuple[float, float]], switch: Switch, workload: Workload, rounds: int) -> dict:
    """The row of one switch, timed in turns with fastmae as it is. Raises LossesDiffer if it computes something else."""
    with Worker(partial(switch.build, workload), workload.device) as switched:
        check_losses({**losses, switch.name: switched.losses(7)}, workload.device)
        times = take_turns({"fastmae": plain, "switched": switched}, workload.device, rounds)
        return {
            "switch": switch.name,
            "adds": switch.adds,
            "images_per_second": workload.batch / times["switched"].median,
            "speed": times["switched"].over(times["fastmae"]),
            "spread": max(t.spread for t in times.values()),
            "fastmae_images_per_second": workload.batch / times["fastmae"].median,
            "peak_memory": switched.peak_memory(),
        }


def table(section: dict) -> list[list[str]]:
    """The section's rows for people."""
    lines = [["fastmae with", "images/s", "x fastmae", "spread", "GiB", "x fastmae"]]
    for r in section["rows"]:
        rate = f"{r['images_per_second']:.{2 if r['images_per_second'] < 100 else 0}f}"
        lines.append([f"{'+ ' if r['adds'] else ''}{r['switch']}", rate, f"{r['speed']:.3f}", f"{r['spread']:.1%}",
                      f"{r['peak_memory'] / 2**30:.2f}", f"{r['memory']:.2f}"])  # fmt: skip
    return lines
