"""Flags that several benchmarks share, with their defaults; nothing here imports torch."""

import argparse
import dataclasses
import math
from pathlib import Path

from fastmae.benchmarks.scaling.cluster import Cluster, explained
from fastmae.cores import usable_cores
from fastmae.train.config.run import COMPILE


def positive(text: str) -> int:
    """A positive whole number, for argparse."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive whole number, got {text!r}")
    return int(text)


def minutes(text: str) -> float:
    """A positive, finite number of minutes, for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a positive number of minutes, got {text!r}")
    return value


def add_scaling_flags(command: argparse.ArgumentParser) -> None:
    """Those of ``scaling``: its own, and one for each parameter of the model of a cluster."""
    command.add_argument("--gpus", type=positive, nargs="+", metavar="N", help="8 to 512")
    command.add_argument("--effective-batch", type=positive, default=4096, metavar="N", help="images a step, 4096")
    command.add_argument("--micro-batch", type=positive, default=128, metavar="N", help="most images of a GPU at once, 128")
    command.add_argument("--docs", action="store_true", help="write docs/scaling.md's tables and its chart")
    for field in dataclasses.fields(Cluster):
        name, text = field.name.replace("_", "-"), explained(Cluster)[field.name].replace("%", "%%")
        command.add_argument(f"--{name}", type=field.type, default=field.default, metavar="X", help=text)


FLAGS: dict[str, dict] = {
    "device": {"choices": ("auto", "cpu", "cuda"), "default": "auto", "help": "a GPU if there is one"},
    "out": {"type": Path, "metavar": "FOLDER", "help": "write <device>-<date>.json, .md and plots there"},
    "models": {"nargs": "+", "metavar": "MODEL", "help": "tiny, small, base, large, huge"},
    "model": {"default": "base", "metavar": "MODEL", "help": "tiny, small, base, large or huge; base"},
    "batches": {"type": positive, "nargs": "+", "metavar": "N", "help": "images a step; a GPU's default is a sweep"},
    "batch": {"type": positive, "metavar": "N", "help": "images; 256 on a GPU, 16 on a CPU (gradients: 8)"},
    "rounds": {"type": positive, "metavar": "N", "default": 5, "help": "turns that each contender gets, 5"},
    "minutes": {"type": float, "default": 9.0, "help": "begin nothing further that would end later, 9"},
    "image-size": {"type": positive, "default": 224, "metavar": "PIXELS", "help": "side of an image, 224"},
    "data": {"type": Path, "metavar": "SHARDS", "required": True, "help": "a folder of shards of 256 px, say"},
    "originals": {"type": Path, "metavar": "SHARDS", "help": "shards of the untouched images, for the reference's pipeline"},
    "workers": {"type": positive, "metavar": "N", "default": usable_cores(), "help": "processes, one per core"},
    "resources": {"action": "store_true", "help": "compile for sm_80, 90, 100 and print what the binaries need"},
    "save": {"action": "store_true", "help": "with --resources: write resources.json"},
    "gpu": {"action": "store_true", "help": "also fed-step"},
    "reference": {"type": Path, "metavar": "CLONE", "help": "a clone of facebookresearch/mae (needs timm)"},
    "contenders": {
        "nargs": "+",
        "choices": ("reference", "rival", "fastmae"),
        "default": ("reference", "rival", "fastmae"),
        "metavar": "WHO",
        "help": "reference, rival, fastmae; all of them",
    },
    "compile": {
        "choices": tuple(how for how in COMPILE if how != "off"),
        "default": "auto",
        "help": "on a GPU: the whole model (auto) or single blocks, in seconds",
    },
    "modes": {
        "nargs": "+",
        "choices": ("model", "blocks"),
        "default": ("model", "blocks"),
        "metavar": "HOW",
        "help": "what is compiled: model, blocks; both",
    },
    "profile": {"action": "store_true", "help": "also where the device's time of a step goes, by kind of kernel"},
    "steps": {"type": positive, "default": 40, "metavar": "N", "help": "timed steps of each, 40"},
    "only": {"nargs": "+", "metavar": "WORD", "default": (), "help": "switches with one of these in their names; all"},
    "together": {
        "type": positive,
        "default": 1,
        "metavar": "N",
        "help": "switches that compile at the same time, if memory holds them, 1",
    },
}
"""Names and what argparse's ``add_argument`` takes."""
