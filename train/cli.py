"""The command line. One line and an exit code for what a user can mend (``fastmae.errors``); a traceback for our own faults."""

import os
import subprocess
import sys
from pathlib import Path

import tyro
from tqdm import tqdm

from fastmae.convert import read_weights, save_weights
from fastmae.data.recode import Recode
from fastmae.data.write import write_shards
from fastmae.errors import DivergedError, InputError
from fastmae.kernels import dispatch
from fastmae.train.demo import demo as run_demo
from fastmae.train.doctor import report
from fastmae.train.pretrain import pretrain as run_pretraining
from fastmae.train.reconstruct import reconstruct_images
from fastmae.train.settings import PretrainSettings

Positional = tyro.conf.Positional


def shards(
    src: Positional[Path],
    out: Positional[Path],
    resize: str = "256",
    quality: int = 90,
    samples_per_shard: int = 1000,
    exif_rotate: bool = True,
    seed: int = 0,
    workers: int | None = None,
) -> None:
    """Turn a folder of images into webdataset shards and an index.

    Args:
        src: Folder of images; its top-level subfolders, if any, are the classes.
        out: Folder to write, empty or new.
        resize: Shorter side in pixels (256, 320, 384, ...), or none to keep the size; images are never enlarged.
        quality: JPEG quality of images that are encoded anew.
        samples_per_shard: Images in a shard.
        exif_rotate: Turn images as their EXIF orientation says.
        seed: Of the global shuffle.
        workers: Processes that decode and encode, by default one per core; the result does not depend on it.
    """
    if resize.lower() != "none" and not (resize.isdigit() and int(resize) > 0):
        raise InputError(f"resize must be a positive number of pixels or none, got {resize!r}")
    workers = len(os.sched_getaffinity(0)) if workers is None else workers
    if workers < 0:
        raise InputError(f"workers must not be negative, got {workers}")
    if not 1 <= quality <= 95:
        raise InputError(f"quality must lie in 1..95, got {quality}")
    side = None if resize.lower() == "none" else int(resize)
    settings = Recode(resize=side, quality=quality, exif_rotate=exif_rotate)
    with tqdm(unit="image", dynamic_ncols=True, delay=0.2) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        index, bad = write_shards(
            src, out, settings, samples_per_shard=samples_per_shard, seed=seed, workers=workers, progress=progress
        )
    for line in bad:
        print(f"left out: {line}", file=sys.stderr)
    size = sum(s.bytes for s in index.shards)
    print(f"{out}: {len(index)} images in {len(index.shards)} shards, {size / 2**20:.1f} MiB, {len(index.classes)} classes, "
          f"{len(bad)} bad images left out")  # fmt: skip


def pretrain(settings: tyro.conf.OmitArgPrefixes[PretrainSettings]) -> None:
    """Pretrain a masked autoencoder on shards."""
    run = settings.run()
    run_pretraining(settings.resolve(world_size=int(os.environ.get("WORLD_SIZE", 1))), run)


def reconstruct(
    checkpoint: Positional[Path],
    images: Positional[Path],
    out: Path = Path("strip.png"),
    mask_ratio: float = 0.75,
    count: int = 8,
    seed: int = 0,
    norm_pix_loss: bool | None = None,
) -> None:
    """Draw what a checkpoint reconstructs: original, masked, reconstruction, and that with the visible patches.

    Args:
        checkpoint: A run's folder, a checkpoint's folder, or a .safetensors or .pth file.
        images: An image, a folder of images, or a folder of shards.
        out: PNG to write.
        mask_ratio: Share of patches removed.
        count: Most images to draw.
        seed: Of the masks.
        norm_pix_loss: Whether the model predicts normalised pixels, for files that do not say so.
    """
    print(
        reconstruct_images(checkpoint, images, out, mask_ratio=mask_ratio, count=count, seed=seed, norm_pix_loss=norm_pix_loss)
    )


def convert(src: Positional[Path], dst: Positional[Path], encoder_only: bool = False) -> None:
    """Convert weights between .safetensors and the reference's .pth; names stay the same.

    Args:
        src: File to read.
        dst: File to write, .safetensors or .pth.
        encoder_only: Leave the decoder out: a ViT under timm's names.
    """
    weights = read_weights(src)
    if encoder_only:
        weights = weights.encoder()
    save_weights(weights, dst)
    print(f"{dst}: {len(weights.tensors)} tensors")


def doctor() -> None:
    """Print versions, devices, and which kernels and attention are used and why not faster ones."""
    print("\n".join(report()))


def demo(out: Path = Path("runs/demo"), steps: int = 1400, workers: int = 1) -> None:
    """Pretrain a small model on ten photographs and draw what it reconstructs.

    Args:
        out: Folder to write; an earlier demo in it is replaced.
        steps: Optimizer steps.
        workers: Loader processes.
    """
    run_demo(out, steps=steps, workers=workers)


def bench() -> None:
    """Measure against the reference: `fastmae bench --help`."""
    _run_benchmarks([])


COMMANDS = {f.__name__: f for f in (shards, pretrain, reconstruct, convert, bench, doctor, demo)}


def check_mode() -> None:
    """Raise InputError on a wrong ``FASTMAE_KERNELS`` before any work is done."""
    try:
        dispatch.mode()
    except ValueError as error:
        raise InputError(str(error)) from error


def main(arguments: list[str] | None = None) -> int:
    """Run one command; return its exit code: 0 done, 2 wrong input, 3 diverged, 130 interrupted."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        check_mode()
        if arguments[:1] == ["bench"]:
            return _run_benchmarks(arguments[1:])
        tyro.extras.subcommand_cli_from_dict(
            COMMANDS, prog="fastmae", description="Masked-autoencoder pretraining.", args=arguments
        )
    except (InputError, DivergedError) as error:
        print(f"fastmae: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:  # a full disk, a file without permission: the user's to mend, and named
        print(f"fastmae: {error.filename or 'input or output'}: {error.strerror or error}", file=sys.stderr)
        return InputError.exit_code
    except KeyboardInterrupt:
        return 130
    return 0


def _run_benchmarks(arguments: list[str]) -> int:
    # A program of its own: benchmarks stand above this layer, and measure best in a process that has done nothing else.
    return subprocess.run([sys.executable, "-m", "fastmae.benchmarks", *arguments], check=False).returncode
