"""``fastmae bench``, or ``python -m fastmae.benchmarks``: measure, print a table, end with one JSON document in a line.

Needs torch, triton and numpy; an optional package that is missing costs its rows or its plot, not the run.
"""

import argparse
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from fastmae.benchmarks import attention, kernels, resources, step, waterfall
from fastmae.benchmarks.machine import environment
from fastmae.benchmarks.report import align, save, update_readme
from fastmae.errors import InputError

_ROOT = Path(__file__).resolve().parents[1]
RESULTS = _ROOT / "benchmarks" / "results"


Part = tuple[str, dict, Callable[[dict], list[list[str]]]]  # a section's name, the section, and what makes its table


def main(arguments: list[str] | None = None) -> int:
    """Run one benchmark; return its exit code: 0 done, 1 losses differ or resources exceed their limits, 2 wrong input."""
    options = parser().parse_args(arguments)
    warnings.simplefilter("ignore")  # torch's hints, which a table's reader cannot act on
    try:
        return options.run(options)
    except InputError as error:
        print(f"fastmae bench: {error}", file=sys.stderr)
        return error.exit_code
    except AssertionError as error:
        print(f"fastmae bench: nothing was timed: {error}", file=sys.stderr)
        return 1


def parser() -> argparse.ArgumentParser:
    """The command line."""
    description = "Measure fastmae against the reference: a table, and one JSON document as the last line."
    top = argparse.ArgumentParser(prog="fastmae bench", description=description)
    commands = top.add_subparsers(required=True, metavar="step | kernels | attention | waterfall | all | readme")

    def add(name: str, run: Callable, help: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=help, description=help)
        command.set_defaults(run=run, command=name)
        if name != "readme":
            command.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="a GPU if there is one")
            command.add_argument("--out", type=Path, metavar="FOLDER", help="write <device>-<date>.json, .md and plots there")
            command.add_argument("--models", nargs="+", metavar="MODEL", help="tiny, small, base, large, huge")
            command.add_argument("--batch", type=int, nargs="+", metavar="N", help="images a step; several make a sweep")
            command.add_argument("--rounds", type=int, help="rounds that the contenders run in turns, by default 5")
            command.add_argument("--minutes", type=float, default=9.0, help="begin nothing that would end later (step, all)")
            command.add_argument("--image-size", type=int, default=224, metavar="PIXELS", help="side of an image, 224")
        return command

    for name, parts, help in (
        ("step", _step, "a training step: the reference, its best rival, fastmae"),
        ("all", _all, "every benchmark, one after the other"),
    ):
        command = add(name, partial(_report, parts), help)
        command.add_argument("--reference", type=Path, metavar="CLONE", help="a clone of facebookresearch/mae (needs timm)")
    command = add("kernels", _kernels_or_resources, "each op: Triton, twin, compiled twin")
    command.add_argument("--resources", action="store_true", help="compile for sm_80, 90, 100 and print what the binaries need")
    command.add_argument("--save", action="store_true", help=f"with --resources: write {resources.TABLE.name}")
    add("attention", partial(_report, _attention), "each attention backend on the shapes of training")
    add("waterfall", partial(_report, _waterfall), "the step with each optimisation switched off alone")
    add("readme", _readme, "write README's table from benchmarks/results")
    return top


def _report(measure: Callable[[argparse.Namespace], Iterator[Part]], options: argparse.Namespace) -> int:
    """Print each part as it is measured, and all of them as one JSON document in the end."""
    document = {}
    for name, section, table in measure(options):
        section = {"environment": environment(_device(options)), **section}
        rows = table(section)
        print("  ".join(f"{k} {v}" for k, v in section["environment"].items() if v is not None))
        print(f"\n{align(rows)}\n")
        for note in section["notes"]:
            print(f"note: {note}")
        if options.out:
            written, lacking = save(options.out, name, section, rows)
            print(f"wrote {', '.join(str(path) for path in written)}{lacking}")
        sys.stdout.flush()
        document[name] = section
    print(json.dumps(document))
    return 0


def _step(options: argparse.Namespace) -> Iterator[Part]:
    device, models = _device(options), _models(options, ["base", "large", "huge"], ["base"])
    step.check_models(models, options.reference)
    section = step.measure_steps(models, options.batch, device, clone=options.reference, rounds=options.rounds,
                                 minutes=options.minutes, image_size=options.image_size)  # fmt: skip
    yield f"step {' '.join(models)}", section, step.table


def _kernels(options: argparse.Namespace) -> Iterator[Part]:
    models = _models(options, ["base", "large", "huge"], ["base"])
    yield "kernels", kernels.measure_kernels(models, _one(options.batch), _device(options)), kernels.table


def _attention(options: argparse.Namespace) -> Iterator[Part]:
    models = _models(options, ["base", "large", "huge"], ["base", "huge"])
    yield "attention", attention.measure_attention(models, _device(options)), attention.table


def _waterfall(options: argparse.Namespace) -> Iterator[Part]:
    model, batch = _models(options, ["base"], ["base"])[0], _one(options.batch)
    section = waterfall.measure_waterfall(model, batch, _device(options), options.rounds, options.image_size)
    yield "waterfall", section, waterfall.table


def _all(options: argparse.Namespace) -> Iterator[Part]:
    for parts in (_attention, _kernels, _step, _waterfall):
        yield from parts(options)


def _kernels_or_resources(options: argparse.Namespace) -> int:
    return _resources(options) if options.resources else _report(_kernels, options)


def _resources(options: argparse.Namespace) -> int:
    found = resources.measure()
    if options.save:
        resources.TABLE.parent.mkdir(exist_ok=True)
        resources.TABLE.write_text(resources.to_json(found))
    print(align(resources.table(found)))
    wrong = resources.exceeded(found)
    print("\n".join(wrong) or "every kernel is within its limits: no stack, 48 KiB of shared memory, 128 registers")
    print(json.dumps(found))
    return 1 if wrong else 0


def _readme(options: argparse.Namespace) -> int:
    update_readme(_ROOT / "README.md", RESULTS)
    return 0


def _device(options: argparse.Namespace) -> torch.device:
    if options.device == "cuda" and not torch.cuda.is_available():
        raise InputError("device cuda was asked for, but torch sees no CUDA device; `fastmae doctor` tells more")
    on_gpu = torch.cuda.is_available() if options.device == "auto" else options.device == "cuda"
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


def _models(options: argparse.Namespace, on_gpu: list[str], on_cpu: list[str]) -> list[str]:
    models = options.models or (on_gpu if _device(options).type == "cuda" else on_cpu)
    step.check_models(models, None)
    return models


def _one(batches: list[int] | None) -> int | None:
    if batches and len(batches) > 1:
        raise InputError(f"this benchmark takes one batch, got {batches}")
    return batches[0] if batches else None
