"""Results in one small archive: ``gpu-part1.tar.gz``."""

import tarfile
from pathlib import Path

LIMIT = 16_000_000  # bytes
_OWN = ("cache", "site", "runs")  # folders of results that are not results


def pack(results: Path, archive: Path, limit: int = LIMIT) -> list[str]:
    """Write what is in ``results``, but for caches and runs, to ``archive`` (.tar.gz) of less than ``limit`` bytes.

    Files are dropped, the largest first and items' JSON never, until it fits; their names are returned. The archive is replaced
    atomically.
    """
    files = [p for p in sorted(results.rglob("*")) if p.is_file() and not p.is_symlink() and _is_result(p, results)]
    dropped: list[str] = []
    partial = archive.with_suffix(".partial")
    while True:
        with tarfile.open(partial, "w:gz") as tar:
            for path in files:
                tar.add(path, path.relative_to(results))
        spare = [p for p in files if p.parent.name != "items" or p.suffix != ".json"]
        if partial.stat().st_size < limit or not spare:
            partial.replace(archive)
            return dropped
        files.remove(largest := max(spare, key=lambda p: p.stat().st_size))
        dropped.append(str(largest.relative_to(results)))


def _is_result(path: Path, results: Path) -> bool:
    return path.relative_to(results).parts[0] not in _OWN and not path.name.endswith((".tar.gz", ".partial"))
