"""``fastmae bench``, or ``python -m fastmae.benchmarks``: measure, print a table, end with one JSON document in a line.

Needs torch, triton and numpy only (``make gpu`` installs nothing); another package that is missing costs its rows or its plot.
Arguments are parsed before torch is imported, so that ``--help`` is quick: each benchmark imports what it measures.
"""

import argparse
import contextlib
import dataclasses
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from fastmae.benchmarks.arguments import check_models, parser
from fastmae.benchmarks.report import align, save, update_readme
from fastmae.benchmarks.scaling.cluster import Cluster
from fastmae.errors import InputError
from fastmae.train import console
from fastmae.train.cli.interrupt import end, interrupts
from fastmae.train.config.modes import check_kernels

if TYPE_CHECKING:
    import torch

_ROOT = Path(__file__).resolve().parents[1]
RESULTS = _ROOT / "benchmarks" / "results"
SCALING = _ROOT / "docs" / "scaling.md"
REFERENCE, REFERENCE_RUN = _ROOT / "docs" / "reference.md", RESULTS / "reference-run.json"
TRAFFIC, PREDICTIONS = _ROOT / "docs" / "traffic.md", _ROOT / "benchmarks" / "predictions" / "traffic.json"

Part = tuple[str, dict, Callable[[dict], list[list[str]]]]  # a section's name, the section, and what makes its table


def main(arguments: list[str] | None = None) -> int:
    """Run one benchmark; return its exit code: 0 done, 1 a wrong result, 2 wrong input, 130 interrupted, 141 unread."""
    console.open_streams()
    try:
        with interrupts(is_last=arguments is None):
            return _run(arguments)
    except KeyboardInterrupt:
        print("fastmae bench: interrupted", file=sys.stderr)
        if arguments is None:
            end(130)
        return 130


def _run(arguments: list[str] | None) -> int:
    try:
        with console.flushed():
            options = parser().parse_args(arguments)
            with console.outlived() if getattr(options, "out", None) else contextlib.nullcontext():
                return _measure(options)
    except OSError as error:  # a full disk, a file without permission: the user's to mend, and named
        print(f"fastmae bench: {error.filename or 'input or output'}: {error.strerror or error}", file=sys.stderr)
        return InputError.exit_code


def _measure(options: argparse.Namespace) -> int:
    from fastmae.benchmarks.timing import LossesDiffer

    warnings.simplefilter("ignore")  # torch's hints, which a table's reader cannot act on
    try:
        check_kernels()
        check_models(options)
        return _RUNS[options.benchmark](options) if options.benchmark in _RUNS else _report(options)
    except InputError as error:
        print(f"fastmae bench: {error}", file=sys.stderr)
        return error.exit_code
    except LossesDiffer as error:
        print(f"fastmae bench: contenders do not do the same work: {error}", file=sys.stderr)
        return 1


def _report(options: argparse.Namespace) -> int:
    """Print each part as it is measured, and all of them as one JSON document in the end."""
    from fastmae.benchmarks.machine import environment

    document = {}
    for name, section, table in _PARTS[options.benchmark](options):
        section = {"environment": environment(_device(options)), **section}
        rows = table(section)
        print("  ".join(f"{k} {v}" for k, v in section["environment"].items() if v is not None))
        print(f"\n{align(rows)}\n")
        for note in section["notes"]:
            print(f"note: {note}")
        if options.out:
            written, missing = save(options.out, name, section, rows)
            print(f"wrote {', '.join(str(path) for path in written)}{missing}")
        for line in section.get("wrong", ()):
            print(f"fastmae bench: {line}", file=sys.stderr)
        sys.stdout.flush()
        document[name] = section
    print(json.dumps(document))
    return int(any(section.get("wrong") for section in document.values()))


def _step(options: argparse.Namespace) -> Iterator[Part]:
    from fastmae.benchmarks.training import kinds, step

    models = _models(options, ["base"])
    section = step.measure_steps(models, options.batches, _device(options), clone=options.reference, rounds=options.rounds,
                                 minutes=options.minutes, image_size=options.image_size, contenders=options.contenders,
                                 compile=options.compile, profile=options.profile, crossmae=options.crossmae)  # fmt: skip
    batches = ["batch", *map(str, options.batches)] if options.batches else []  # results of the day at other batches stay
    name = [*models, *_size(options), *batches, *([options.compile] if options.compile != "auto" else [])]
    profiles = step.profiles(section)
    yield " ".join(["step", *name]), section, step.table
    if options.profile:
        yield " ".join(["profile", *name]), profiles, kinds.table


def _gradients(options: argparse.Namespace) -> Iterator[Part]:
    from fastmae.benchmarks.training import gradients

    section = gradients.measure_gradients(options.model, options.batch, _device(options), data=options.data,
                                          image_size=options.image_size, modes=options.modes)  # fmt: skip
    yield " ".join(["gradients", options.model, *_size(options)]), section, gradients.table


def _reference_run(options: argparse.Namespace) -> Iterator[Part]:
    from fastmae.benchmarks.machine import environment
    from fastmae.benchmarks.training import reference_page, reference_run

    if options.docs and options.reference is None:
        raise InputError("--docs needs --reference CLONE: the page is of the reference itself")
    device = _device(options)
    plan = reference_run.Plan(steps=options.steps, device=device)
    section = {"environment": environment(device), **reference_run.measure_run(plan, options.reference, options.data)}
    yield reference_page.NAME, section, reference_run.table
    if options.docs and not section["wrong"]:
        reference_page.write_page(REFERENCE, REFERENCE_RUN, section)


def _kernels(options: argparse.Namespace) -> Iterator[Part]:
    if getattr(options, "check", False):
        if options.models or options.batch:
            raise InputError("--check takes its sizes from --shape, not from --models or --batch")
        from fastmae.benchmarks.kernels import check

        yield "kernels check", check.measure_errors(options.shape, _device(options)), check.table
        return
    if getattr(options, "shape", None):
        raise InputError("--shape needs --check; times are taken of --models")
    from fastmae.benchmarks.kernels import speed as kernels

    models = _models(options, ["base"])
    yield "kernels", kernels.measure_kernels(models, options.batch, _device(options)), kernels.table


def _attention(options: argparse.Namespace) -> Iterator[Part]:
    from fastmae.benchmarks.kernels import attention

    models = _models(options, ["base", "huge"])
    yield "attention", attention.measure_attention(models, _device(options)), attention.table


def _waterfall(options: argparse.Namespace) -> Iterator[Part]:
    from fastmae.benchmarks.training import waterfall

    section = waterfall.measure_waterfall(options.model, options.batch, _device(options), options.rounds, options.image_size,
                                          options.minutes, options.only, options.together)  # fmt: skip
    yield " ".join(["waterfall", options.model, *_size(options)]), section, waterfall.table


def _loader(options: argparse.Namespace) -> Iterator[Part]:
    device = _device(options)
    if options.gpu and device.type != "cuda":
        raise InputError("--gpu needs a CUDA device; `fastmae doctor` shows why there is none")
    from fastmae.benchmarks import loader  # needs the packages that read data, which other benchmarks do without

    rounds = options.rounds or (5 if options.minutes is None else None)
    section = loader.measure_loader(options.data, options.originals, options.workers, rounds, options.minutes)
    yield "loader", section, loader.table
    if options.gpu:
        yield from _fed_step(options)


def _fed_step(options: argparse.Namespace) -> Iterator[Part]:
    device = _device(options)
    from fastmae.benchmarks import loader

    batch = options.batch or (256 if device.type == "cuda" else 16)
    section = loader.measure_fed_step(options.model, options.data, batch, options.workers, device, steps=options.steps,
                                      image_size=options.image_size)  # fmt: skip
    yield " ".join(["fed step", options.model, *_size(options)]), section, loader.fed_table


def _size(options: argparse.Namespace) -> list[str]:
    return [] if options.image_size == 224 else [f"{options.image_size}px"]


def _all(options: argparse.Namespace) -> Iterator[Part]:
    for parts in (_attention, _kernels, _step, _waterfall):
        yield from parts(options)


def _kernels_or_resources(options: argparse.Namespace) -> int:
    if not options.resources:
        if options.save:
            raise InputError("--save needs --resources, whose table it writes")
        return _report(options)
    from fastmae.benchmarks.kernels import resources

    return resources.report(save=options.save)


def _scaling(options: argparse.Namespace) -> int:
    from fastmae.benchmarks.scaling import model, page

    models = options.models or list(model.MODELS)
    cluster = Cluster(**{field.name: getattr(options, field.name) for field in dataclasses.fields(Cluster)})
    section = model.predict_scaling(models, options.gpus or model.GPUS, cluster, RESULTS,
                                    effective_batch=options.effective_batch, micro_batch=options.micro_batch)  # fmt: skip
    if options.docs:
        page.write_page(SCALING, section)
    page.show(section)
    return 0


def _traffic(options: argparse.Namespace) -> int:
    from fastmae.benchmarks.traffic import page, predict

    if options.docs:
        page.write_page(TRAFFIC, PREDICTIONS, options.models or ())
        return 0
    models = options.models or ["base"]
    section = predict.predict_traffic(models, options.batch, options.gpu, options.residual, options.contenders,
                                      options.image_size, options.fused, options.attention, options.list)  # fmt: skip
    page.show(section)
    return 0


def _readme(options: argparse.Namespace) -> int:
    update_readme(_ROOT / "README.md", RESULTS)
    return 0


def _device(options: argparse.Namespace) -> "torch.device":
    import torch

    from fastmae.train.distributed.world import trains_on_gpu

    return torch.device("cuda", torch.cuda.current_device()) if trains_on_gpu(options.device) else torch.device("cpu")


def _models(options: argparse.Namespace, on_cpu: list[str]) -> list[str]:
    return options.models or (["base", "large", "huge"] if _device(options).type == "cuda" else on_cpu)


_PARTS = {"step": _step, "gradients": _gradients, "reference-run": _reference_run, "kernels": _kernels,
          "attention": _attention, "waterfall": _waterfall, "loader": _loader, "fed-step": _fed_step, "all": _all}  # fmt: skip
_RUNS = {"kernels": _kernels_or_resources, "scaling": _scaling, "traffic": _traffic, "readme": _readme}
