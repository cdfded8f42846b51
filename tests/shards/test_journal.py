"""An interrupted build resumes: what is finished is kept, what is damaged is made again, and nothing else is mixed in."""

import errno
import fcntl
import json
import os
import shutil

import pytest

from fastmae import InputError
from fastmae.images.recode import Recode
from fastmae.lock import LOCK
from fastmae.shards.build import write_shards
from fastmae.shards.index import Index
from fastmae.shards.journal import UNFINISHED, Plan
from tests.support.shards import KEEP, contents


def build(source, out, settings=KEEP, *, stop=None, seed=0, samples_per_shard=10, workers=0):
    """Build shards, or the part of it up to image ``stop``; return the calls of ``progress``."""
    calls = []

    def progress(done, total):
        calls.append((done, total))
        if done == stop:
            raise KeyboardInterrupt

    try:
        write_shards(source, out, settings, seed=seed, samples_per_shard=samples_per_shard, workers=workers, progress=progress)
    except KeyboardInterrupt:
        assert stop is not None
    return calls


def marks(folder):
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in folder.glob("*.tar")}


@pytest.fixture
def source(image_folder, tmp_path):
    """A copy of the images, two of them bad."""
    shutil.copytree(image_folder, tmp_path / "source")
    for name in ("ant/photo.000.jpg", "bee/photo.022.jpg"):
        (tmp_path / "source" / name).write_bytes(b"no image")
    return tmp_path / "source"


@pytest.fixture
def complete(source, tmp_path):
    """What an uninterrupted build makes of ``source``."""
    build(source, tmp_path / "complete")
    return contents(tmp_path / "complete")


@pytest.mark.parametrize("workers", [0, 2])
def test_an_interrupted_build_leaves_complete_shards_and_resumes(source, complete, workers, tmp_path):
    out = tmp_path / "out"
    build(source, out, stop=25, workers=workers)
    assert sorted(p.name for p in out.iterdir()) == [UNFINISHED, "shard-000000.tar", "shard-000001.tar"]
    before = marks(out)
    calls = build(source, out, workers=workers)
    assert calls == [(10, 37), (20, 37), *((i, 37) for i in range(21, 38))]
    assert contents(out) == complete
    after = marks(out)
    assert {name: after[name] for name in before} == before


def test_bad_images_of_finished_shards_are_named_again(source, complete, tmp_path):
    build(source, tmp_path / "out", stop=37)
    assert sorted(write_shards(source, tmp_path / "out", KEEP, samples_per_shard=10)[1]) == [
        f"{source / name}: UnidentifiedImageError: not an image of a known format"
        for name in ("ant/photo.000.jpg", "bee/photo.022.jpg")
    ]
    assert contents(tmp_path / "out") == complete


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "damage",
    [
        lambda out: flip(out / "shard-000001.tar"),
        lambda out: os.truncate(out / "shard-000001.tar", 1000),
        lambda out: (out / "shard-000001.tar").unlink(),
        lambda out: flip(out / UNFINISHED / "shard-000001.json"),
        lambda out: (out / UNFINISHED / "shard-000001.json").write_text("[]"),
        lambda out: (out / UNFINISHED / "shard-000001.json").unlink(),
    ],
    ids=["a flipped bit", "truncated", "missing", "its record flipped", "its record nonsense", "its record missing"],
)
def test_a_finished_shard_that_is_damaged_is_made_again(damage, source, complete, tmp_path):
    out = tmp_path / "out"
    build(source, out, stop=35)
    before = marks(out)
    damage(out)
    calls = build(source, out)
    assert [calls[0], calls[1], calls[-1]] == [(10, 37), (20, 37), (37, 37)] and len(calls) == 2 + 17
    assert contents(out) == complete
    changed = {name for name, mark in before.items() if marks(out)[name] != mark}
    assert changed == {"shard-000001.tar"}


def test_temporary_files_of_a_killed_build_are_removed_and_others_kept(source, complete, tmp_path):
    out = tmp_path / "out"
    build(source, out, stop=25)
    for name in (".shard-000002.tar.partial", ".index.npy.partial", ".index.json.partial", ".writable-host-7"):
        (out / name).write_bytes(b"half")
    (out / UNFINISHED / ".shard-000002.json.partial").write_bytes(b"half")
    (out / "notes.txt").write_bytes(b"mine")
    build(source, out)
    assert contents(out) == {**complete, "notes.txt": b"mine"}


def test_a_build_killed_before_it_removed_its_journal_resumes_too(source, complete, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(Plan, "remove", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        build(source, out, stop=-1)
    assert (out / "index.json").exists() and (out / UNFINISHED).is_dir()
    assert build(source, out) == [(10, 37), (20, 37), (30, 37), (37, 37)]
    assert contents(out) == complete
    shutil.copytree(source, out / f"{UNFINISHED}.removed")  # killed while it removed it
    with pytest.raises(InputError, match="holds shards already"):
        build(source, out)
    assert contents(out) == complete


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"settings": Recode(resize=32)}, "other settings: resize was None, now 32; give the same settings"),
        ({"settings": Recode(resize=None, quality=80)}, "quality was 90, now 80"),
        ({"settings": Recode(resize=None, exif_rotate=False)}, "exif_rotate was True, now False"),
        ({"samples_per_shard": 9, "seed": 1}, "samples_per_shard was 10, now 9; seed was 0, now 1"),
    ],
)
def test_other_settings_are_refused_by_name(change, message, source, tmp_path):
    out = tmp_path / "out"
    build(source, out, stop=15)
    before = contents(out / UNFINISHED)
    with pytest.raises(InputError, match=message):
        build(source, out, **change)
    assert {**before, LOCK: None} == {**contents(out / UNFINISHED), LOCK: None} and len(marks(out)) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: path.unlink(), "it had 37 images, now 36; restore them"),
        (lambda path: shutil.copy(path, path.with_name("new.jpg")), "it had 37 images, now 38"),
        (lambda path: path.rename(path.with_name("new.jpg")), "the path, length or time of change of at least one has changed"),
        (lambda path: os.utime(path, (1, 1)), "the path, length or time"),
    ],
    ids=["fewer", "more", "renamed", "touched"],
)
def test_other_images_are_refused(change, message, source, tmp_path):
    build(source, tmp_path / "out", stop=15)
    change(source / "cat" / "photo.002.jpg")
    with pytest.raises(InputError, match=rf"out: holds an unfinished build of other images: {message}.*or remove the folder"):
        build(source, tmp_path / "out")


def test_a_damaged_plan_is_refused(source, tmp_path):
    build(source, tmp_path / "out", stop=5)
    plan = tmp_path / "out" / UNFINISHED / "plan.json"
    plan.write_text(plan.read_text().replace("256", "128")[:-3])
    with pytest.raises(InputError, match=r"plan.json: damaged, .*; remove the folder"):
        build(source, tmp_path / "out")


def test_another_shard_format_is_refused(source, tmp_path, monkeypatch):
    build(source, tmp_path / "out", stop=15)
    monkeypatch.setattr("fastmae.shards.journal.FORMAT", 99)
    with pytest.raises(InputError, match=r"format was \d+, now 99"):
        build(source, tmp_path / "out")


def test_shards_without_a_plan_or_with_an_index_are_refused(source, complete, tmp_path):
    with pytest.raises(InputError, match="holds shards already; choose an empty folder, or remove it first"):
        build(source, tmp_path / "complete")
    (tmp_path / "complete" / "index.json").unlink()
    with pytest.raises(InputError, match="holds shards already"):
        build(source, tmp_path / "complete")
    assert not (tmp_path / "complete" / UNFINISHED).exists()


def test_a_refused_build_that_was_killed_leaves_no_shards_that_seem_unfinished(source, complete, tmp_path):
    (tmp_path / "complete" / UNFINISHED).mkdir()  # and was killed before it looked at the shards
    with pytest.raises(InputError, match="holds shards already"):
        build(source, tmp_path / "complete")
    assert not (tmp_path / "complete" / UNFINISHED).exists() and contents(tmp_path / "complete") == complete


def test_two_builds_into_one_folder_are_refused_and_the_first_is_unharmed(source, complete, tmp_path):
    out, refused = tmp_path / "out", []

    def again(done, _):
        if done == 15:
            with pytest.raises(
                InputError, match=f"another build writes here, process {os.getpid()} on .*; wait for its end, or choose"
            ) as error:
                build(source, out)
            refused.append(error)

    write_shards(source, out, KEEP, samples_per_shard=10, progress=again)
    assert refused and contents(out) == complete


def test_a_file_system_without_locks_is_warned_of_and_used(source, complete, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with pytest.warns(UserWarning, match=r"this file system has no locks \(Function not implemented\)"):
        build(source, tmp_path / "out")
    assert contents(tmp_path / "out") == complete


def test_the_plan_states_what_is_built(source, tmp_path):
    build(source, tmp_path / "out", stop=15)
    plan = json.loads((tmp_path / "out" / UNFINISHED / "plan.json").read_text())["content"]
    assert plan["settings"]["samples_per_shard"] == 10 and plan["images"] == 37 and len(plan["listing"]) == 16
    record = json.loads((tmp_path / "out" / UNFINISHED / "shard-000000.json").read_text())["content"]
    assert record["shard"]["name"] == "shard-000000.tar" and len(record["rows"]) == record["shard"]["samples"]
    build(source, tmp_path / "out")
    assert vars(Index.load(tmp_path / "out").shards[0]) == record["shard"]
