"""Files that are complete or absent, and flushed to the disk."""

import os
from pathlib import Path

import pytest
import xxhash

from fastmae.errors import InputError
from fastmae.files import digest, write_atomically


def test_bytes_are_flushed_before_the_rename_and_the_folder_after_it(tmp_path, monkeypatch):
    steps, fsync, replace = [], os.fsync, Path.replace

    def note_fsync(handle):
        steps.append(("fsync", Path(f"/proc/self/fd/{handle}").readlink().name))
        fsync(handle)

    def note_replace(self, target):
        steps.append(("replace", self.name))
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(Path, "replace", note_replace)
    with write_atomically(tmp_path / "a") as file:
        file.write(b"bytes")
    assert steps == [("fsync", ".a.partial"), ("replace", ".a.partial"), ("fsync", tmp_path.name)]
    assert (tmp_path / "a").read_bytes() == b"bytes"


def test_a_failed_write_leaves_the_previous_file_and_no_other(tmp_path):
    (tmp_path / "a").write_bytes(b"before")
    with pytest.raises(KeyboardInterrupt), write_atomically(tmp_path / "a") as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("a", b"before")]


def test_a_file_that_cannot_be_opened_is_named_and_nothing_is_removed(tmp_path):
    (tmp_path / ".a.partial").mkdir()
    with pytest.raises(InputError, match="a: cannot be written, Is a directory"), write_atomically(tmp_path / "a"):
        pass
    assert (tmp_path / ".a.partial").is_dir()


def test_a_digest_is_of_all_bytes(tmp_path):
    data = os.urandom((2 << 20) + 5)
    (tmp_path / "a").write_bytes(data)
    with (tmp_path / "a").open("rb") as file:
        assert digest(file) == xxhash.xxh3_64_hexdigest(data)
