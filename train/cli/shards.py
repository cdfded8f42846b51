"""The commands of ``fastmae shards``: build, verify, info, index. Each imports what it runs after arguments are parsed."""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from tqdm import tqdm

from fastmae.cores import usable_cores
from fastmae.errors import DataError, InputError
from fastmae.train.config.run import optional

if TYPE_CHECKING:
    from fastmae.shards.index import Index

Images = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="IMAGES")]
Shards = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SHARDS")]
_NAMED_CLASSES = 5  # in ``info``


def build(
    images: Images,
    shards: Shards,
    resize: str = "256",
    quality: int = 90,
    samples_per_shard: int = 1000,
    exif_rotate: bool = True,
    seed: int = 0,
    workers: optional(int, "INT", "one per core") = None,
) -> None:
    """Build webdataset shards and an index from a folder of images. A killed build continues where it was.

    Args:
        images: Folder of images; its top-level subfolders, if any, are the classes.
        shards: Folder to write: new, empty, or of the same build, unfinished.
        resize: Shorter side in pixels (256, 320, 384, ...), or none to keep the size; images are never enlarged.
        quality: JPEG quality of images that are encoded again.
        samples_per_shard: Images in a shard.
        exif_rotate: Rotate images by their EXIF orientation.
        seed: Seed of the global shuffle.
        workers: Worker processes; the result does not depend on their number.
    """
    from fastmae.images.recode import Recode
    from fastmae.shards.build import write_shards

    if resize.lower() != "none" and not (resize.isdecimal() and int(resize) > 0):
        raise InputError(f"resize must be a positive number of pixels or none, got {resize!r}")
    if not 1 <= quality <= 95:
        raise InputError(f"quality must lie in 1..95, got {quality}")
    side = None if resize.lower() == "none" else int(resize)
    settings = Recode(resize=side, quality=quality, exif_rotate=exif_rotate)
    processes = _processes(workers)
    try:
        with _bar("image") as progress:
            found, bad = write_shards(
                images, shards, settings, samples_per_shard=samples_per_shard, seed=seed, workers=processes, progress=progress
            )
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"{shards}: interrupted; the same command continues from the finished shards") from None
    for line in bad:
        print(f"skipped: {line}", file=sys.stderr)
    size = sum(s.bytes for s in found.shards)
    print(f"{shards}: {len(found)} images in {len(found.shards)} shards, {size / 2**20:.1f} MiB, {len(found.classes)} classes, "
          f"{len(bad)} bad images skipped")  # fmt: skip


def verify(folder: Shards, decode: bool = False, workers: optional(int, "INT", "one per core") = None) -> None:
    """Read every byte of a folder of shards and name what is damaged. Exit code 0: all of it matches the index.

    Args:
        folder: Folder with index.json.
        decode: Decode every image as well.
        workers: Worker processes.
    """
    from fastmae.shards.index import JSON_NAME
    from fastmae.shards.verify import verify_shards

    with _bar("shard") as progress:
        damage = verify_shards(folder, decode_images=decode, workers=_processes(workers), progress=progress)
    for line in damage:
        print(line, file=sys.stderr)
    if damage and not (folder / JSON_NAME).exists():
        raise DataError(f"{folder}: has no index to verify against")
    if damage:
        count = "1 error" if len(damage) == 1 else f"{len(damage)} errors"
        raise DataError(f"{folder}: {count}; restore those files, or build the shards again")
    print(f"{folder}: every byte matches the index")


def info(folder: Shards) -> None:
    """Print what a folder of shards holds.

    Args:
        folder: Folder with index.json.
    """
    print("\n".join(_describe(folder)))


def index(
    folder: Shards,
    out: optional(Path, "PATH", "SHARDS") = None,
    classes: optional(Path, "PATH", "no names") = None,
    workers: optional(int, "INT", "one per core") = None,
) -> None:
    """Index existing webdataset tars, for exact order and exact resume.

    Args:
        folder: Folder of uncompressed tars, which are not changed.
        out: Folder for the index.
        classes: Text file of class names, one per line, in the order of the numbers in .cls members.
        workers: Worker processes.
    """
    from fastmae.shards.index_tars import index_shards

    try:
        names = tuple(classes.read_text("utf-8").splitlines()) if classes else ()
    except UnicodeDecodeError as error:
        raise InputError(f"{classes}: must be UTF-8 text, a class name per line ({error})") from error
    with _bar("shard") as progress:
        made = index_shards(folder, out, classes=names, workers=_processes(workers), progress=progress)
    without = made.build.get("without_image", 0)
    skipped = f", {without} samples without an image skipped" if without else ""
    print(f"{made.folder}: {len(made)} images in {len(made.shards)} shards{skipped}")


def _processes(workers: int | None) -> int:
    if workers is not None and workers < 0:
        raise InputError(f"workers must not be negative, got {workers}")
    return usable_cores() if workers is None else workers


@contextmanager
def _bar(unit: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar, as the function (done, total) that moves it."""
    with tqdm(unit=unit, dynamic_ncols=True, delay=0.2) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield progress


def _describe(folder: str | Path) -> list[str]:
    """Shards, samples, bytes, mean image, classes with their counts, settings and fingerprint of ``folder``, a line each.

    Raises DataError if the index is damaged or a shard is missing or truncated.
    """
    from fastmae.shards.index import Index

    index = Index.load(folder)
    total = sum(shard.bytes for shard in index.shards)
    return [
        f"folder: {index.folder}",
        f"shards: {len(index.shards)}",
        f"samples: {len(index)}",
        f"bytes: {total} ({total / 2**30:.2f} GiB)",
        f"mean image: {index.table['size'].mean() / 2**10:.1f} KiB",
        f"classes: {_classes(index)}",
        "made by: " + ("fastmae shards index" if index.build.get("indexed") else "fastmae shards build"),
        "settings: " + (", ".join(f"{name}={value}" for name, value in index.build.items()) or "none"),
        f"fingerprint: {index.fingerprint}",
    ]


def _classes(index: "Index") -> str:
    """How many classes, and the largest by name or number, with their counts."""
    counts = Counter(index.table["label"].tolist())
    unlabelled = sum(count for label, count in counts.items() if label < 0)
    labelled = sorted(((-count, label) for label, count in counts.items() if label >= 0))
    named = [f"{index.classes[n] if n < len(index.classes) else n} {-count}" for count, n in labelled[:_NAMED_CLASSES]]
    shown = ", ".join(named + ["..."] * (len(labelled) > _NAMED_CLASSES))
    parts = [f"{max(len(index.classes), len(labelled))} ({shown})" if labelled else "none"]
    return ", ".join(parts + ([f"{unlabelled} samples without one"] if unlabelled else []))
