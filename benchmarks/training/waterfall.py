"""``waterfall``: what each optimisation is worth, by switching it off alone in fastmae's step. All run in turns."""

import contextlib
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from fastmae.benchmarks.timing import check_losses
from fastmae.benchmarks.training.contenders import LR, MASK_RATIO, WEIGHT_DECAY, Contender, Workload, choose, fastmae_contender
from fastmae.benchmarks.training.worker import OutOfMemory, Worker, losses_of, take_turns
from fastmae.errors import InputError
from fastmae.model.config import FUSED, preset
from fastmae.train.step.loss_module import LossModule
from fastmae.train.step.optimizer import parameter_groups
from fastmae.train.step.step import Step


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
        """The loss under the same mask: the indices of the shuffled order are noise that sorts into it."""
        return self.model(images, MASK_RATIO, noise=ids_restore.float())[0]


class PlainUpdate(Step):
    """The step with the AdamW that torch takes when nothing is asked for."""

    def __init__(self, module: nn.Module, optimizer: AdamW, *loss, **settings):
        super().__init__(module, AdamW(parameter_groups(module, WEIGHT_DECAY), lr=LR, betas=(0.9, 0.95)), *loss, **settings)

    def _update(self, is_finite: Tensor, spike: Tensor) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


# Files whose ops a training step calls and that have no rival but their twins. What a block fuses has torch's own operations.
KERNELS = ("random_masking", "patches", "decoder_input", "masked_mse")

SWITCHES = (
    Switch("no torch.compile", {"compile": "off"}, devices=("cuda",)),
    Switch("torch.compile of single blocks", {"compile": "blocks"}, devices=("cuda",)),
    Switch("torch.compile of the model", {"compile": "model"}, devices=("cpu",), adds=True),
    Switch("CUDA graph of the step", {"graphs": True}, devices=("cuda",), adds=True),
    Switch("eager twins in place of Triton kernels", {"kernels_off": KERNELS}, devices=("cuda",)),
    *(Switch(f"kernel {name} off", {"kernels_off": (name,)}, devices=("cuda",)) for name in KERNELS),
    *(Switch(f"kernel {name} not chosen", {"not_chosen": (name,)}, devices=("cuda",)) for name in ("short", *FUSED)),
    Switch("nothing fused in blocks", config={"fused": "off"}, devices=("cuda",)),
    Switch(
        "all fused in blocks, by name", config={"fused": ",".join(FUSED), "attention": "short"}, devices=("cuda",), adds=True
    ),
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


def measure_waterfall(model: str, batch: int | None, device: torch.device, rounds: int = 5, image_size: int = 224,
                      minutes: float = 9.0, only: Sequence[str] = (), together: int = 1) -> dict[str, object]:  # fmt: skip
    """The section ``waterfall`` of a result: the step unchanged, and with each switch alone.

    ``only``: switches with one of these texts in their names. ``together``: so many of them compile at the same time, and
    take their turns with each other: quicker, if the device's memory holds them. Raises InputError on a text in no name.
    """
    batch = batch or (256 if device.type == "cuda" else 16)
    config = preset(model, norm_pix_loss=True, img_size=image_size)
    workload = Workload(name=model, config=config, batch=batch, device=device)
    began, longest = time.monotonic(), 0.0
    rows, notes = [{"switch": "fastmae", "adds": False, "speed": 1.0}], []
    known = [s for s in SWITCHES if device.type in s.devices]
    switches = [s for s in known if not only or any(text in s.name for text in only)]
    for text in only:
        if not any(text in s.name for s in known):
            raise InputError(
                f"only must be a part of a switch's name on {device.type} ({'; '.join(s.name for s in known)}), got {text!r}"
            )
    losses: dict[str, tuple[float, float]] = {}
    if device.type == "cuda":  # here, because the workers compile beside each other
        choose(config, device)
    with Worker(partial(fastmae_contender, workload), device) as plain:
        groups = [switches[i : i + together] for i in range(0, len(switches), together)]
        while groups:
            group, started = groups.pop(0), time.monotonic()
            if rows[1:] and started - began + longest > 60 * minutes:
                names = ", ".join(s.name for s in group)
                notes.append(f"{names}: skipped, would not fit into {minutes:g} minutes")
                continue
            try:
                rows += _against(plain, losses, group, workload, rounds)
            except (OutOfMemory, RuntimeError) as error:
                if len(group) > 1:  # each by itself
                    groups = [[switch] for switch in group] + groups
                else:
                    notes.append(f"{group[0].name}: {error}")
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


def _against(plain: Worker, losses: dict[str, tuple[float, float]], switches: list[Switch], workload: Workload,
             rounds: int) -> list[dict]:  # fmt: skip
    """Rows of the switches, timed in turns with fastmae unchanged, whose first ``losses`` are kept for later calls.

    Raises LossesDiffer if one computes something else.
    """
    with contextlib.ExitStack() as stack:
        switched = {s.name: stack.enter_context(Worker(partial(s.build, workload), workload.device)) for s in switches}
        fresh = {"fastmae": plain, **switched} if not losses else switched
        found = losses_of(fresh, 7)
        losses |= {"fastmae": found["fastmae"]} if not losses else {}  # of the weights that all start from
        check_losses({**losses, **found}, workload.device)
        times = take_turns({"fastmae": plain, **switched}, workload.device, rounds)
        return [
            {
                "switch": s.name,
                "adds": s.adds,
                "images_per_second": workload.batch / times[s.name].median,
                "speed": times[s.name].over(times["fastmae"]),
                "spread": max(times[s.name].spread, times["fastmae"].spread),
                "fastmae_images_per_second": workload.batch / times["fastmae"].median,
                "peak_memory": switched[s.name].peak_memory(),
            }
            for s in switches
        ]


def table(section: dict) -> list[list[str]]:
    """The section's table."""
    lines = [["fastmae with", "images/s", "x fastmae", "spread", "GiB", "x fastmae"]]
    for r in section["rows"]:
        rate = f"{r['images_per_second']:.{2 if r['images_per_second'] < 100 else 0}f}"
        lines.append([f"{'+ ' if r['adds'] else ''}{r['switch']}", rate, f"{r['speed']:.3f}", f"{r['spread']:.1%}",
                      f"{r['peak_memory'] / 2**30:.2f}", f"{r['memory']:.2f}"])  # fmt: skip
    return lines
