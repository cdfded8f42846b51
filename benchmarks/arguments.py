"""The arguments of ``fastmae bench`` and of each benchmark, with their defaults; nothing here imports torch."""

import argparse
import dataclasses
import math
from pathlib import Path

from fastmae.benchmarks.peers import NAMES as PEERS
from fastmae.benchmarks.scaling.cluster import Cluster, explained
from fastmae.cores import usable_cores
from fastmae.errors import InputError
from fastmae.model.config import FUSED
from fastmae.train.config.modes import COMPILE

MODELS = ("tiny", "small", "base", "large", "huge")
_REFERENCE_MODELS = MODELS[2:]
_CONTENDERS = ("reference", "rival", "fastmae")
TRAFFIC_CONTENDERS = ("fastmae", "standard", "rival", "reference")
DESCRIBED = ("A100", "H100", "H200", "B200")
_ALL_CONTENDERS = (*_CONTENDERS, *PEERS)
_MODES = ("model", "blocks")

# name -> (what it measures, its flags)
_BENCHMARKS = {
    "step": ("a training step: the reference, its best rival and fastmae",
             "device out models batches rounds minutes image-size reference crossmae contenders compile profile"),
    "gradients": ("gradients of the compiled model against eager ones, on photographs",
                  "device out model batch image-size modes photographs"),
    "reference-run": ("a small run of the reference and one of fastmae, loss by loss",
                      "device out reference photographs updates page"),
    "kernels": ("each op: its Triton kernel, its plain torch twin, and the twin compiled",
                "device out models batch check shape resources save"),
    "attention": ("each attention backend on the shapes of a training step", "device out models"),
    "waterfall": ("the training step with each optimisation switched off alone",
                  "device out model batch rounds minutes image-size only together"),
    "loader": ("images per second from shards to batches, against other pipelines",
               "device out data originals workers model batch gpu turns at-most"),
    "fed-step": ("the training step fed from shards, beside the same step fed from memory",
                 "device out data workers model batch image-size steps"),
    "all": ("attention, kernels, step and waterfall, one after the other",
            "device out models model batches batch rounds minutes image-size reference crossmae contenders compile profile "
            "only together"),
    "traffic": ("predicted, no GPU needed: launches, bytes and time of a training step by kind of kernel",
                "models-traffic images described residual image-size counted fused attention list docs-traffic"),
    "scaling": ("a model, no measurement: step time and efficiency on 8 to 512 GPUs",
                "models gpus effective-batch micro-batch docs"),
}  # fmt: skip


def parser() -> argparse.ArgumentParser:
    """The command line; ``benchmark`` is the name of the one to run."""
    description = "Measure fastmae against the reference: a table, and one JSON document as the last line."
    top = argparse.ArgumentParser(prog="fastmae bench", description=description)
    commands = top.add_subparsers(dest="benchmark", required=True, metavar=" | ".join(_BENCHMARKS))
    for name, (help, flags) in _BENCHMARKS.items():
        command = commands.add_parser(name, help=help, description=f"{help[0].upper()}{help[1:]}.")
        for flag in flags.split():
            command.add_argument(f"--{_NAMES.get(flag, flag)}", **_FLAGS[flag])
        if name == "scaling":  # a flag for each parameter of the model
            texts = explained(Cluster)
            for field in dataclasses.fields(Cluster):
                text = f"{texts[field.name].replace('%', '%%')} (default: {field.default:g})"
                command.add_argument(f"--{field.name.replace('_', '-')}", type=field.type, default=field.default,
                                     metavar="VALUE", help=text)  # fmt: skip
    commands.choices["loader"].set_defaults(steps=_FLAGS["steps"]["default"], image_size=_FLAGS["image-size"]["default"])
    commands.add_parser("readme")  # for those who change the project: not in the list of --help
    return top


def check_models(options: argparse.Namespace) -> None:
    """Raise InputError on a model that does not exist, or that the reference given does not have."""
    known = _REFERENCE_MODELS if getattr(options, "reference", None) else MODELS
    for names, choices in ((getattr(options, "models", None) or [], known), ([getattr(options, "model", "base")], MODELS)):
        for name in names:
            if name not in choices:
                raise InputError(f"model must be one of {', '.join(choices)}, got {name!r}")


def _positive(text: str) -> int:
    """A positive integer, for argparse."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text!r}")
    return int(text)


def _minutes(text: str) -> float:
    """A positive, finite number of minutes, for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a positive number of minutes, got {text!r}")
    return value


def _flag(help: str, **settings) -> dict:
    """What ``add_argument`` takes; ``--help`` shows a default that is a number or a word."""
    shown = settings.get("default")
    shown = " ".join(shown) if isinstance(shown, tuple) else shown
    return {"help": f"{help} (default: {shown})" if shown not in (None, "") else help, **settings}


_FLAGS: dict[str, dict] = {
    "device": _flag("auto: a GPU if there is one", choices=("auto", "cpu", "cuda"), default="auto"),
    "out": _flag("folder to write <device>-<date>.json, .md and plots to", type=Path, metavar="FOLDER"),
    "models": _flag(f"{', '.join(MODELS)} (default: base, large and huge; fewer on a CPU)", nargs="+", metavar="MODEL"),
    "models-traffic": _flag(f"{', '.join(MODELS)} (default: base; with --docs: base, large and huge)", nargs="+",
                            metavar="MODEL"),
    "model": _flag(", ".join(MODELS), default="base", metavar="MODEL"),
    "batches": _flag("images per step (default: 64 to 1024 on a GPU, 16 on a CPU)", type=_positive, nargs="+", metavar="N"),
    "batch": _flag("images (default: 256 on a GPU, 16 on a CPU; gradients on a CPU: 8)", type=_positive, metavar="N"),
    "rounds": _flag("rounds in which each contender is timed once", type=_positive, metavar="N", default=5),
    "minutes": _flag("start no measurement that would end later", type=float, metavar="MINUTES", default=9.0),
    "turns": _flag("rounds in which each pipeline is timed once (default: 5, or as many as fit into --minutes)",
                   type=_positive, metavar="N"),
    "at-most": _flag("start no round that would end later; at least one is run (default: no limit)", type=_minutes,
                     metavar="MINUTES"),
    "image-size": _flag("side of an image in pixels", type=_positive, default=224, metavar="PIXELS"),
    "data": _flag("folder of shards, for instance of 256-pixel images", type=Path, metavar="SHARDS", required=True),
    "photographs": _flag("folder of shards of photographs (default: those that come with scikit-image)", type=Path,
                         metavar="SHARDS"),
    "originals": _flag("shards of the original images, for the reference's pipeline (default: --data)", type=Path,
                       metavar="SHARDS"),
    "workers": _flag("loader processes, one per core", type=_positive, metavar="N", default=usable_cores()),
    "check": _flag("no times: the greatest errors of each op against float64, beside torch's own", action="store_true"),
    "shape": _flag("with --check: sizes as B=2,C=13,H=64,W=64,p=8,D=96,N=65,heads=3: images, channels, height, width, patch, "
                   "tokens' width, tokens, heads (default: small ones; on a GPU ViT-B's too)", nargs="+", metavar="SIZES"),
    "resources": _flag("compile for sm_80, sm_90 and sm_100 without a GPU; print registers, stack and shared memory",
                       action="store_true"),
    "save": _flag("with --resources: write benchmarks/results/resources.json", action="store_true"),
    "gpu": _flag("run fed-step as well", action="store_true"),
    "reference": _flag("a clone of facebookresearch/mae; needs timm (default: a plain PyTorch twin of it)", type=Path,
                       metavar="CLONE"),
    "crossmae": _flag("a clone of TonyLianLong/CrossMAE, for the contender of that name; needs timm", type=Path,
                      metavar="CLONE"),
    "contenders": _flag(f"some of {', '.join(_ALL_CONTENDERS)}; hf needs transformers, lightly needs lightly and timm",
                        nargs="+", choices=_ALL_CONTENDERS, default=_CONTENDERS, metavar="CONTENDER"),
    "compile": _flag("what torch.compile compiles on a GPU: the full model (auto) or single blocks, which takes seconds",
                     choices=tuple(how for how in COMPILE if how != "off"), default="auto"),
    "modes": _flag("what torch.compile compiles: model, blocks", nargs="+", choices=_MODES, default=_MODES, metavar="MODE"),
    "profile": _flag("also show the device's time of a step by kind of kernel", action="store_true"),
    "steps": _flag("timed steps of each", type=_positive, default=40, metavar="N"),
    "updates": _flag("updates of each run", type=_positive, default=300, metavar="N"),
    "page": _flag("write docs/reference.md, its picture and benchmarks/results/reference-run.json; needs --reference",
                  action="store_true"),
    "only": _flag("only switches with one of these texts in their names (default: all)", nargs="+", metavar="TEXT", default=()),
    "together": _flag("switches to compile at the same time, if memory holds them", type=_positive, default=1, metavar="N"),
    "images": _flag("images per step", type=_positive, default=256, metavar="N"),
    "described": _flag("GPUs by data sheet", nargs="+", choices=DESCRIBED, default=("H100",), metavar="GPU"),
    "residual": _flag("dtypes of fastmae's residual stream: fp32, bf16", nargs="+", choices=("fp32", "bf16"),
                      default=("fp32", "bf16"), metavar="DTYPE"),
    "counted": _flag(f"some of {', '.join(TRAFFIC_CONTENDERS)}; standard is fastmae without the kernels chosen by measurement",
                     nargs="+", choices=TRAFFIC_CONTENDERS, default=TRAFFIC_CONTENDERS, metavar="CONTENDER"),
    "fused": _flag(f"fused operations of fastmae's blocks: off, or some of {', '.join(FUSED)} joined by commas",
                   default=",".join(FUSED), metavar="NAMES"),
    "attention": _flag("attention kernel of fastmae: short, or sdpa, torch's flash attention", choices=("short", "sdpa"),
                       default="short"),
    "list": _flag("also show every kernel: how often it is launched, its bytes, what it reads and writes", action="store_true"),
    "docs-traffic": _flag("write docs/traffic.md and benchmarks/predictions/traffic.json, for --models alone if it is given",
                          action="store_true"),
    "gpus": _flag("numbers of GPUs (default: 8 16 32 64 128 256 512)", type=_positive, nargs="+", metavar="N"),
    "effective-batch": _flag("images per step over all GPUs", type=_positive, default=4096, metavar="N"),
    "micro-batch": _flag("most images per GPU at once", type=_positive, default=128, metavar="N"),
    "docs": _flag("write the tables and the chart of docs/scaling.md", action="store_true"),
}  # fmt: skip
_NAMES = {"turns": "rounds", "at-most": "minutes", "photographs": "data", "updates": "steps", "page": "docs",
          "images": "batch", "described": "gpu", "counted": "contenders", "docs-traffic": "docs",
          "models-traffic": "models"}  # fmt: skip
"""The flag on the command line, where two benchmarks mean different things by it."""
