"""A tar's members, listed strictly: what Python's own reader passes over in silence is an error here.

``tarfile`` knows the formats (ustar, PAX, GNU long names, base-256 sizes), but it takes a damaged header, a zeroed block or a
cut between members for the end of the tar, and it believes whatever length a header states. So every header is checked
before ``tarfile`` acts on it, every member must lie inside the file, and what follows the last one must be a tar's end: two
zero blocks or more, up to the last byte. Format: POSIX.1-2001 pax, "ustar Interchange Format".
"""

import os
import re
import tarfile
from pathlib import Path
from typing import BinaryIO, NamedTuple

from fastmae.errors import DataError

BLOCK = tarfile.BLOCKSIZE  # 512 bytes: headers are one, data is padded to whole ones


class Member(NamedTuple):
    """A regular file in a tar: its name, the offset of its data in the tar, and their length in bytes."""

    name: str
    offset: int
    size: int


def list_members(path: Path) -> list[Member]:
    """The regular files of an uncompressed tar in their order; directories are skipped.

    Raises DataError naming path, offset and reason if the tar is damaged or cut at any place, or if it holds links, devices,
    sparse files, two members of one name, or names that lead out of a folder. Neither time nor memory depend on what headers
    claim, only on the length of the file.
    """
    try:
        if not path.is_file():
            raise DataError(f"{path}: not a file; give a tar")
        with path.open("rb") as file:
            return _list(file, os.fstat(file.fileno()).st_size)
    except _Refused as error:
        raise DataError(f"{path}: {error}") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read, {error.strerror}; restore it, or leave it out") from error


class _Refused(Exception):
    """Why a tar is not used; ``list_members`` puts the path before it."""


class _Header(tarfile.TarInfo):
    """A header that is checked before ``tarfile`` reads what it announces."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> tarfile.TarInfo:
        file = tar.fileobj
        start = file.tell()
        info = cls.frombuf(file.read(BLOCK), tar.encoding, tar.errors)
        if info.size < 0:  # tarfile would go backwards, for ever
            raise _Refused(f"{_at(info.name, start)} states a negative size; {_RESTORE}")
        if info.type == tarfile.GNUTYPE_SPARSE:
            raise _Refused(f"{_at(info.name, start)} is a sparse file; {_REWRITE}")
        if info.type in _EXTENDED:
            if start + info.size - tar.offset > _MOST_EXTENDED:
                raise _Refused(f"extended headers at offset {tar.offset} of more than {_MOST_EXTENDED} bytes; {_RESTORE}")
            _check_payload(file, info, start, tar.pax_headers)
        file.seek(start)
        return super().fromtarfile(tar)


_EXTENDED = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
_MOST_EXTENDED = 1 << 20  # bytes before one member; a long name takes about 1 KiB
_MOST_GLOBAL = 1000  # records for the whole tar, which tarfile copies for every member; git archive writes one
_MOST_DIGITS = 255  # in a row; tarfile of Python 3.11 searches them in quadratic time
_KINDS = {
    tarfile.LNKTYPE: "hard link",
    tarfile.SYMTYPE: "symbolic link",
    tarfile.CHRTYPE: "character device",
    tarfile.BLKTYPE: "block device",
    tarfile.FIFOTYPE: "fifo",
}
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstd
# All that tarfile was seen or may be feared to raise on damaged headers.
_GARBAGE = (tarfile.TarError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RecursionError, MemoryError,
            EOFError)  # fmt: skip
_RESTORE = "restore the file, or leave it out"
_REWRITE = "write the tar anew, of regular files with relative names only"


def _list(file: BinaryIO, length: int) -> list[Member]:
    members: list[Member] = []
    names: set[str] = set()
    at = 0  # where the next header must be
    try:
        tar = tarfile.TarFile(fileobj=file, tarinfo=_Header, encoding="utf-8")
        while (info := tar.next()) is not None:
            tar.members.clear()  # tarfile keeps them, with a copy of the global header each
            _check_member(info, tar.offset, length)
            if info.isreg():
                if info.name in names:
                    raise _Refused(f"{_at(info.name, info.offset)} comes a second time; {_REWRITE}")
                names.add(info.name)
                members.append(Member(info.name, info.offset_data, info.size))
            at = tar.offset
    except _GARBAGE as error:
        if at == 0:
            _refuse_start(file, length)
        raise _Refused(f"damaged header at offset {at} ({error}); {_RESTORE}") from error
    _check_end(file, at, length)
    return members


def _check_payload(file: BinaryIO, info: tarfile.TarInfo, start: int, common: dict) -> None:
    """What an extended header holds must be there and, in PAX, be whole records and nothing else.

    tarfile takes records of any stated length, so that some hundred kilobytes of overlapping ones become gigabytes.
    """
    padded = -(-info.size // BLOCK) * BLOCK
    payload = file.read(padded)
    where = f"extended header at offset {start}"
    if len(payload) < padded:
        raise _Refused(f"{where} is cut; {_RESTORE}")
    if info.type in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK):
        return
    if max(map(len, re.findall(rb"\d+", payload)), default=0) > _MOST_DIGITS:
        raise _Refused(f"{where} holds a number of more than {_MOST_DIGITS} digits; {_RESTORE}")
    payload = payload.rstrip(b"\0")
    at = count = 0
    while at < len(payload):
        digits, _, _ = payload[at : at + 9].partition(b" ")
        end = at + int(digits) if digits.isdigit() else at
        key, equals, value = payload[at + len(digits) + 1 : end].partition(b"=")
        is_whole = key and equals and value.endswith(b"\n") and end <= len(payload)
        if not is_whole or (key == b"size" and not value[:-1].isdigit()):
            raise _Refused(f"{where} is damaged; {_RESTORE}")
        if key.startswith(b"GNU.sparse"):
            raise _Refused(f"{where} announces a sparse file; {_REWRITE}")
        at = end
        count += 1
    if info.type == tarfile.XGLTYPE and count + len(common) > _MOST_GLOBAL:
        raise _Refused(f"{where}: more than {_MOST_GLOBAL} records for the whole tar; {_RESTORE}")


def _check_member(info: tarfile.TarInfo, following: int, length: int) -> None:
    """A member must be a file or a folder with a harmless name, lie inside the tar and end where the next header is."""
    member = _at(info.name, info.offset)
    if not (info.isreg() or info.isdir()) or info.issparse():
        raise _Refused(f"{member} is a {_KINDS.get(info.type, f'member of unknown type {info.type!r}')}; {_REWRITE}")
    if not info.name or info.name.startswith("/") or ".." in info.name.split("/"):
        raise _Refused(f"{member}: its name is empty, absolute or leads upwards; {_REWRITE}")
    there = length - info.offset_data
    if info.isreg() and info.size > there:
        raise _Refused(
            f"{member} states {info.size} bytes, the file of {length} bytes holds {there} of them: cut inside its data, or a "
            f"damaged header; {_RESTORE}"
        )
    if info.isreg() and following != info.offset_data + -(-info.size // BLOCK) * BLOCK:
        raise _Refused(f"{member}: its headers disagree on its size; {_RESTORE}")
    if following > length:
        raise _Refused(f"cut at offset {length}, inside the padding after {member}; {_RESTORE}")


def _check_end(file: BinaryIO, at: int, length: int) -> None:
    """From ``at`` on, where tarfile stopped, there must be zeros to the end, two blocks of them or more."""
    file.seek(at)
    block = file.read(BLOCK)
    if not block:
        raise _Refused(f"cut at offset {at}, between two members: the end marker of two zero blocks is missing; {_RESTORE}")
    if any(block):
        what = "damaged header" if len(block) == BLOCK else "cut inside the header"
        raise _Refused(f"{what} at offset {at}; {_RESTORE}")
    position = at
    while block:
        if data := block.lstrip(b"\0"):
            found = position + len(block) - len(data)
            raise _Refused(f"zeroed block at offset {at}, with data after it from offset {found} on; {_RESTORE}")
        position += len(block)
        block = file.read(1 << 20)
    if length - at < 2 * BLOCK:
        raise _Refused(f"cut at offset {length}, inside the end marker of two zero blocks; {_RESTORE}")


def _refuse_start(file: BinaryIO, length: int) -> None:
    """Say what a file is that has no readable header at its start."""
    file.seek(0)
    start = file.read(16)
    if start.startswith(_COMPRESSED):
        raise _Refused("compressed: cannot be read at random; gunzip it, or stream it")
    if not start:
        raise _Refused(f"empty, at offset 0 a tar has a header; {_RESTORE}")
    raise _Refused(f"not a tar, or damaged at offset 0: its {length} bytes begin with {start!r}; {_RESTORE}")


def _at(name: str, offset: int) -> str:
    """A member for a message; names come from the file and may be of any length and hold anything."""
    return f"member {name[:200]!r} at offset {offset}"
