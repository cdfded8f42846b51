"""Whether ``--data`` and ``--out`` exist and are the same for every process."""

import shutil
from pathlib import Path

import xxhash

from fastmae.errors import InputError, SampleError
from fastmae.files import make_folder
from fastmae.shards.index import JSON_NAME, Index
from fastmae.shards.read import ShardReader
from fastmae.shards.staged import lacking_bytes, staged_folder
from fastmae.shards.urls import find_shards
from fastmae.train.distributed.shared_folder import check_shared
from fastmae.train.distributed.world import World
from fastmae.train.doctor.findings import Report, describe_groups, group_ranks, name_ranks
from fastmae.train.doctor.inventory import Inventory

_BYTES_SAVED = 4 * 3 + 4  # of a parameter in a checkpoint: weights and two moments, and weights again for other programs


def check_data(report: Report, world: World, data: str, allow_pipe: bool) -> None:
    """Every process opens ``data`` and reads some of it; all must find the same."""
    try:
        found, wrong = _open(data, world.size, allow_pipe), None
    except (InputError, SampleError) as error:
        found, wrong = None, str(error)
    except OSError as error:
        found, wrong = None, f"{error.filename or data}: cannot be read, {error.strerror or error}"
    answers = world.gather([(world.rank, found, wrong)])
    for text, ranks in group_ranks({rank: text for rank, _, text in answers if text}).items():
        report.error(f"--data on {name_ranks(ranks)}: {text}")
    seen = {rank: answer for rank, answer, text in answers if not text}
    if len(set(seen.values())) > 1:
        report.error(
            f"--data {data}: is not the same everywhere: {describe_groups(seen)}; give a folder that all machines share, or "
            "the same copy on each"
        )
    elif len(seen) == world.size:
        report.line(f"--data {data}: {seen[0]}, the same on every rank, first, middle and last sample read")


def check_stage(report: Report, world: World, everyone: list[Inventory], data: str, root: Path) -> None:
    """Each machine's own disk must have space for the copy of ``data``; one process of each machine looks."""
    answers = world.gather([(world.rank, _room_to_stage(data, root))] if world.local_rank == 0 else [])
    if wrong := {rank: text for rank, (fits, text) in answers if not fits}:
        for text, ranks in group_ranks(wrong).items():
            hosts = ", ".join(dict.fromkeys(everyone[rank].host for rank in ranks))
            report.error(f"--stage on {hosts} ({name_ranks(ranks)}): {text}")
    else:
        report.line(f"--stage {root}: {'; '.join(group_ranks({rank: text for rank, (_, text) in answers}))}")


def check_out(report: Report, world: World, everyone: list[Inventory], out: Path, parameters: int | None, keep: int) -> None:
    """``out`` must be one folder that every process can write, with disk space for checkpoints."""
    try:
        make_folder(out)
        wrong = None
    except InputError as error:
        wrong = str(error)
    answers = world.gather([(world.rank, wrong)])
    refused = {rank: text for rank, text in answers if text}
    for text, ranks in group_ranks(refused).items():
        report.error(f"--out on {name_ranks(ranks)}: {text}")
    if refused:
        return
    try:
        check_shared(out, world)
    except InputError as error:
        hosts = ", ".join(sorted({one.host for one in everyone}))
        report.error(f"--out {error} (machines: {hosts})")
        return
    free = world.gather([shutil.disk_usage(out).free])[0]
    one = _BYTES_SAVED * parameters if parameters else None
    room = f", a checkpoint takes {one / 1e9:.2f} GB and {keep} are kept" if one else ""
    report.line(f"--out {out}: the same folder on every rank, {free} bytes ({free / 1e9:.1f} GB) free{room}")
    if one and free < one:
        report.error(f"--out {out}: {free} bytes are free, one checkpoint needs {one}; free disk space, or give another --out")
    elif one and free < (keep + 1) * one:
        report.warning(
            f"--out {out}: {free} bytes are free, --keep {keep} needs {(keep + 1) * one} while it saves; free disk space, or "
            "give a smaller --keep"
        )


def _room_to_stage(data: str, root: Path) -> tuple[bool, str]:
    """Whether a copy of ``data`` fits this machine's disk, and a message with the bytes."""
    try:
        index = Index.load(data, check_shards=False)
    except InputError as error:
        return False, f"--stage copies indexed shards: {error}"
    needed = lacking_bytes(index, staged_folder(root, index))
    if not needed:
        return True, "already copied"
    parent = next(folder for folder in (root.absolute(), *root.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(parent).free
    if needed > free:
        return False, f"{root}: {needed} bytes are needed, {free} are free; free disk space, or give another --stage"
    return True, f"{needed / 1e9:.2f} GB to copy to each machine, enough disk space"


def _open(data: str, processes: int, allow_pipe: bool) -> str:
    """A description of ``data`` with its fingerprint, to compare. Reads a few samples of indexed shards."""
    if (Path(data) / JSON_NAME).is_file():
        index = Index.load(data)
        reader = ShardReader(index)
        for sample in sorted({0, len(index) // 2, len(index) - 1}):
            try:
                reader.read(sample)
            except SampleError as error:
                raise SampleError(f"{reader.name(sample)}: {error}") from error
        return f"{len(index)} samples in {len(index.shards)} shards, fingerprint {index.fingerprint}"
    shards = find_shards(data, processes, allow_pipe=allow_pipe)
    local = [Path(shard) for shard in shards if "://" not in shard and not shard.startswith("pipe:")]
    files = [(path.name, path.stat().st_size) for path in local]
    names = xxhash.xxh3_64_hexdigest("\n".join([*shards, *map(str, files)]).encode())
    return f"stream of {len(shards)} shards, names and sizes {names}"
