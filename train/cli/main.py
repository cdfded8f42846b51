"""The command line. One line and an exit code for what a user can mend (``fastmae.errors``); a traceback for our own faults.

Arguments are parsed before torch is imported, so that help and wrong arguments answer at once: commands import what they run.
"""

import contextlib
import functools
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import tyro

from fastmae.errors import CheckpointError, DivergedError, InputError, LostProcessError, RequeueError
from fastmae.files import open_home
from fastmae.train import console
from fastmae.train.cli.interrupt import end, interrupts
from fastmae.train.cli.pretrain import doctor, of_resumed_run, pretrain
from fastmae.train.cli.shards import Images, build, index, info, verify
from fastmae.train.config.modes import check_kernels
from fastmae.train.config.run import optional
from fastmae.train.config.settings import switches

Checkpoint = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
Run = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
In = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="IN")]
Out = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]


def reconstruct(
    checkpoint: Checkpoint,
    images: Images,
    out: Path = Path("strip.png"),
    mask_ratio: float = 0.75,
    count: int = 8,
    seed: int = 0,
    norm_pix_loss: optional(bool, "{True,False}", "what the file says") = None,
) -> None:
    """Draw what a checkpoint reconstructs: original, masked, reconstruction, and the reconstruction with the visible patches.

    Args:
        checkpoint: A run's folder, a checkpoint's folder, or a .safetensors or .pth file.
        images: An image, a folder of images, or a folder of shards.
        out: Picture to write, in the format of its suffix: .png, .jpg, .webp, .tiff, .pdf; PNG without one.
        mask_ratio: Share of patches masked.
        count: Most images to draw.
        seed: Of the masks.
        norm_pix_loss: Whether the model predicts normalised pixels, for files that do not say so.
    """
    from fastmae.train.cli.reconstruct import reconstruct_images

    print(
        reconstruct_images(checkpoint, images, out, mask_ratio=mask_ratio, count=count, seed=seed, norm_pix_loss=norm_pix_loss)
    )


def report(run: Run, out: optional(Path, "PATH", "RUN/report.html") = None) -> None:
    """Write one self-contained HTML page about a run: curves, reconstructions, restarts, errors, settings.

    Args:
        run: A run's folder.
        out: Page to write.
    """
    from fastmae.train.report.report import write_report

    print(write_report(run, out))


def convert(src: In, dst: Out, encoder_only: bool = False) -> None:
    """Convert weights between .safetensors and the reference's .pth; names stay the same.

    Args:
        src: File to read.
        dst: File to write, .safetensors or .pth.
        encoder_only: Write no decoder: a ViT under timm's names.
    """
    from fastmae.model.weights import read_weights, save_weights

    weights = read_weights(src)
    if encoder_only:
        weights = weights.encoder()
    save_weights(weights, dst)
    print(f"{dst}: {len(weights.tensors)} tensors")


def demo(out: Path = Path("runs/demo"), steps: int = 1400, workers: int = 1) -> None:
    """Pretrain a small model on ten photographs and draw what it reconstructs.

    Args:
        out: Folder to write; an earlier demo in it is replaced.
        steps: Optimizer steps.
        workers: Loader processes.
    """
    from fastmae.train.cli.demo import demo as run_demo

    run_demo(out, steps=steps, workers=workers)


def bench() -> None:
    """Measure against the reference: `fastmae bench --help`."""
    _run_benchmarks([])


def shards() -> None:
    """Build, verify, describe or index shards: `fastmae shards --help`."""
    _run_shards(["--help"])


SHARDS = {f.__name__: f for f in (build, verify, info, index)}
PRINTING = {"info", "doctor"}
"""Commands whose result is what they print: without standard output they end. The others' is a file, or their exit code."""
COMMANDS = {f.__name__: f for f in (shards, pretrain, reconstruct, report, convert, bench, doctor, demo)}


def main(arguments: list[str] | None = None) -> int:
    """Run one command; return its exit code: 0 done, 2 wrong input, 3 diverged, 4 a process lost or stuck, 5 no checkpoint
    could be written, 85 stopped and to be started again, 130 interrupted. SystemExit 141: nobody reads what it prints.

    A process of a run of several that fails does not return: it ends here with that code, or with 1.
    """
    console.open_streams()
    try:
        with interrupts(is_last=arguments is None):
            code = _run(sys.argv[1:] if arguments is None else arguments)
    except KeyboardInterrupt as interrupt:
        console.report(str(interrupt) or "interrupted")
        code = 130
        if arguments is None:
            end(code)
    except Exception:
        if not _in_group():
            raise
        traceback.print_exc()
        code = 1
    if _in_group():
        # Torch's threads may still wait for a lost process, or abort this one while the interpreter ends (exit code 134, seen
        # with torch 2.13).
        end(code)
    return code


def _run(arguments: list[str]) -> int:
    try:
        if arguments[:1] == ["bench"]:
            return _run_benchmarks(arguments[1:])
        with console.flushed():
            if arguments[:1] == ["shards"]:
                _run_shards(arguments[1:])
            else:
                if arguments[:1] in (["pretrain"], ["doctor"]):
                    arguments = switches(arguments)
                commands = {**COMMANDS, **{f.__name__: of_resumed_run(f, arguments[1:]) for f in (pretrain, doctor)}}
                return _run_one(commands, "fastmae", "Masked-autoencoder pretraining.", arguments)
    except (InputError, DivergedError, LostProcessError, CheckpointError, RequeueError) as error:
        console.report(str(error))
        return error.exit_code
    except (MemoryError, RuntimeError, OSError) as error:
        if message := _system_error(error):
            console.report(message)
            return InputError.exit_code
        raise
    return 0


def _system_error(error: Exception) -> str | None:
    """What the system does not give, in a line: memory, room on a disk, a file. None for a fault of another kind."""
    from fastmae.train.pretrain.out_of_memory import is_out_of_memory

    if is_out_of_memory(error):
        return f"out of memory: {str(error).partition(chr(10))[0] or type(error).__name__}; this machine has too little"
    if isinstance(error, OSError):  # a full disk, a file without permission: the user's to mend, and named
        return f"{error.filename or 'input or output'}: {error.strerror or error}"
    return None


def _run_shards(arguments: list[str]) -> None:
    _run_one(SHARDS, "fastmae shards", "Shards of images, and their index.", arguments)


def _run_one(commands: dict[str, Callable], prog: str, description: str, arguments: list[str]) -> int:
    """Parse ``arguments``, and run the one of ``commands`` that they name; return its exit code, 0 if it has none."""
    checked = {name: _checked(command) for name, command in commands.items()}
    name = next(iter(arguments), "-")
    if name in checked:  # parsed alone: an error then suggests no other command's settings
        return tyro.cli(checked[name], prog=f"{prog} {name}", args=arguments[1:]) or 0
    if not name.startswith("-"):
        raise InputError(f"no such command: {prog} {name}; the commands are {', '.join(commands)}")
    return tyro.extras.subcommand_cli_from_dict(checked, prog=prog, description=description, args=arguments) or 0


def _checked(command: Callable) -> Callable:
    """``command``, after ``check_kernels``, with ``~`` in paths opened; it outlives its console unless one of ``PRINTING``."""

    @functools.wraps(command)
    def run(*args, **kwargs):
        check_kernels()
        args = tuple(open_home(value) if isinstance(value, Path) else value for value in args)
        kwargs = {name: open_home(value) if isinstance(value, Path) else value for name, value in kwargs.items()}
        with contextlib.nullcontext() if command.__name__ in PRINTING else console.outlived():
            return command(*args, **kwargs)

    return run


def _in_group() -> bool:
    """Whether this process has joined a run of several: not if it has never imported what joins one."""
    join = sys.modules.get("fastmae.train.distributed.join")
    return join is not None and join.in_group()


def _run_benchmarks(arguments: list[str]) -> int:
    # A program of its own: benchmarks stand above this layer, and measure best in a process that has done nothing else.
    with subprocess.Popen([sys.executable, "-m", "fastmae.benchmarks", *arguments]) as process:
        try:
            return process.wait()
        except KeyboardInterrupt:  # it says so itself
            process.send_signal(signal.SIGINT)
            return process.wait()
