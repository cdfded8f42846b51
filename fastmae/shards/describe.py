"""What a folder of indexed shards holds, in a few lines."""

from pathlib import Path

import numpy as np

from fastmae.shards.index import Index

_MOST_CLASSES = 5  # that are named


def describe(folder: str | Path) -> list[str]:
    """Shards, samples, bytes, mean image, classes with their counts, settings and fingerprint of ``folder``, a line each.

    Raises DataError if the index is damaged or a shard is missing or cut.
    """
    index = Index.load(folder)
    total = sum(shard.bytes for shard in index.shards)
    return [
        f"folder: {index.folder}",
        f"shards: {len(index.shards)}",
        f"samples: {len(index)}",
        f"bytes: {total} ({total / 2**30:.2f} GiB)",
        f"mean image: {index.table['size'].mean() / 2**10:.1f} KiB",
        f"classes: {_describe_classes(index)}",
        "made by: " + ("indexing tars of others" if index.build.get("indexed") else "building"),
        "settings: " + (", ".join(f"{name}={value}" for name, value in index.build.items()) or "none"),
        f"fingerprint: {index.fingerprint}",
    ]


def _describe_classes(index: Index) -> str:
    """How many, and the largest by name or number."""
    numbers, counts = np.unique(index.table["label"], return_counts=True)
    largest = np.argsort(-counts, kind="stable")
    named = [(int(numbers[i]), int(counts[i])) for i in largest]
    labelled = [f"{_name(index, number)} {count}" for number, count in named if number >= 0]
    unlabelled = sum(count for number, count in named if number < 0)
    shown = ", ".join(labelled[:_MOST_CLASSES]) + (", ..." if len(labelled) > _MOST_CLASSES else "")
    parts = [f"{max(len(index.classes), len(labelled))} ({shown})" if labelled else "none"]
    return ", ".join(parts + ([f"{unlabelled} samples without one"] if unlabelled else []))


def _name(index: Index, number: int) -> str:
    return index.classes[number] if number < len(index.classes) else str(number)
