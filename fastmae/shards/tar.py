"""A tar's members, listed strictly: what Python's own reader skips silently is an error here.

``tarfile`` knows the formats (ustar, PAX, GNU long names, base-256 sizes), but it takes a damaged header, a zeroed block or a
truncation between members for the end of the tar, and it trusts any length that a header states. So every header is checked
before ``tarfile`` acts on it, every member must be inside the file, and after the last one there must be the end marker: two
zero blocks or more, up to the last byte. Format: POSIX.1-2001 pax, "ustar Interchange Format".
"""

import os
import re
import tarfile
from pathlib import Path
from typing import BinaryIO, NamedTuple

from fastmae.errors import DataError

BLOCK = tarfile.BLOCKSIZE  # 512 bytes: a header is one, data is padded to a multiple


class Member(NamedTuple):
    """A regular file in a tar: its name, the offset of its data in the tar, and their length in bytes."""

    name: str
    offset: int
    size: int


def list_members(path: Path) -> list[Member]:
    """The regular files of an uncompressed tar in their order; directories are skipped.

    Raises DataError naming path, offset and reason if the tar is damaged or truncated anywhere, or if it holds links, devices,
    sparse files, two members of one name, or names that lead out of a folder. Time and memory depend on the length of the file
    alone, whatever its headers state.
    """
    try:
        if not path.is_file():
            raise DataError(f"{path}: not a file; give a tar")
        with path.open("rb") as file:
            return _list(file, os.fstat(file.fileno()).st_size)
    except _Refused as error:
        raise DataError(f"{path}: {error}") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read, {error.strerror}; {_RESTORE}") from error


class _Refused(Exception):
    """Why a tar is not used; ``list_members`` adds the path."""


class _Header(tarfile.TarInfo):
    """A header that is checked before ``tarfile`` reads what follows it."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> tarfile.TarInfo:
        file = tar.fileobj
        start = file.tell()
        info = cls.frombuf(file.read(BLOCK), tar.encoding, tar.errors)
        if info.size < 0:  # tarfile would go backwards, endlessly
            raise _Refused(f"{_at(info.name, start)} states a negative size; {_RESTORE}")
        if info.type == tarfile.GNUTYPE_SPARSE:
            raise _Refused(f"{_at(info.name, start)} is a sparse file; {_REWRITE}")
        if info.type in _EXTENDED:
            if start + info.size - tar.offset > _MAX_EXTENDED:
                raise _Refused(f"extended headers at offset {tar.offset} of more than {_MAX_EXTENDED} bytes; {_RESTORE}")
            _check_payload(file, info, start, tar.pax_headers)
        file.seek(start)
        return super().fromtarfile(tar)


_EXTENDED = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
_MAX_EXTENDED = 1 << 20  # bytes before one member; a long name takes about 1 KiB
_MAX_GLOBAL = 1000  # records of a global header, which tarfile copies for every member; git archive writes one
_MAX_DIGITS = 255  # consecutive ones; tarfile of Python 3.11 searches them in quadratic time
_KINDS = {
    tarfile.LNKTYPE: "hard link",
    tarfile.SYMTYPE: "symbolic link",
    tarfile.CHRTYPE: "character device",
    tarfile.BLKTYPE: "block device",
    tarfile.FIFOTYPE: "fifo",
}
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstd
# All that tarfile raises, or might raise, on damaged headers.
_TARFILE_ERRORS = (tarfile.TarError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RecursionError,
                   MemoryError, EOFError)  # fmt: skip
_RESTORE = "restore the file, or move it elsewhere"
_REWRITE = "write the tar again, of regular files with relative names only"


def _list(file: BinaryIO, length: int) -> list[Member]:
    members: list[Member] = []
    names: set[str] = set()
    at = 0  # offset of the next header
    try:
        tar = tarfile.TarFile(fileobj=file, tarinfo=_Header, encoding="utf-8")
        while (info := tar.next()) is not None:
            tar.members.clear()  # tarfile keeps them, with a copy of the global header each
            _check_member(info, tar.offset, length)
            if info.isreg():
                if info.name in names:
                    raise _Refused(f"{_at(info.name, info.offset)} is a duplicate name; {_REWRITE}")
                names.add(info.name)
                members.append(Member(info.name, info.offset_data, info.size))
            at = tar.offset
    except _TARFILE_ERRORS as error:
        if at == 0:
            _refuse_start(file, length)
        raise _Refused(f"damaged header at offset {at} ({error}); {_RESTORE}") from error
    _check_end(file, at, length)
    return members


def _check_payload(file: BinaryIO, info: tarfile.TarInfo, start: int, common: dict) -> None:
    """The payload of an extended header must be there and, in PAX, consist of complete records.

    tarfile accepts records of any stated length, so that some hundred kilobytes of overlapping ones become gigabytes.
    """
    padded = -(-info.size // BLOCK) * BLOCK
    payload = file.read(padded)
    where = f"extended header at offset {start}"
    if len(payload) < padded:
        raise _Refused(f"{where} is truncated; {_RESTORE}")
    if info.type in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK):
        return
    if max(map(len, re.findall(rb"\d+", payload)), default=0) > _MAX_DIGITS:
        raise _Refused(f"{where} holds a number of more than {_MAX_DIGITS} digits; {_RESTORE}")
    payload = payload.rstrip(b"\0")
    at = count = 0
    while at < len(payload):
        digits, _, _ = payload[at : at + 9].partition(b" ")
        end = at + int(digits) if digits.isdigit() else at
        key, equals, value = payload[at + len(digits) + 1 : end].partition(b"=")
        is_complete = key and equals and value.endswith(b"\n") and end <= len(payload)
        if not is_complete or (key == b"size" and not value[:-1].isdigit()):
            raise _Refused(f"{where} is damaged; {_RESTORE}")
        if key.startswith(b"GNU.sparse"):
            raise _Refused(f"{where} describes a sparse file; {_REWRITE}")
        at = end
        count += 1
    if info.type == tarfile.XGLTYPE and count + len(common) > _MAX_GLOBAL:
        raise _Refused(f"{where}: more than {_MAX_GLOBAL} global records; {_RESTORE}")


def _check_member(info: tarfile.TarInfo, following: int, length: int) -> None:
    """A member must be a file or a folder with a harmless name, inside the tar, and end where the next header begins."""
    member = _at(info.name, info.offset)
    if not (info.isreg() or info.isdir()) or info.issparse():
        raise _Refused(f"{member} is a {_KINDS.get(info.type, f'member of unknown type {info.type!r}')}; {_REWRITE}")
    if not info.name or info.name.startswith("/") or ".." in info.name.split("/"):
        raise _Refused(f"{member}: its name is empty, absolute or leads upwards; {_REWRITE}")
    there = length - info.offset_data
    if info.isreg() and info.size > there:
        raise _Refused(
            f"{member} states {info.size} bytes, the file of {length} bytes holds {there} of them: truncated inside its data, "
            f"or a damaged header; {_RESTORE}"
        )
    if info.isreg() and following != info.offset_data + -(-info.size // BLOCK) * BLOCK:
        raise _Refused(f"{member}: its headers disagree on its size; {_RESTORE}")
    if following > length:
        raise _Refused(f"truncated at offset {length}, inside the padding after {member}; {_RESTORE}")


def _check_end(file: BinaryIO, at: int, length: int) -> None:
    """From ``at``, where tarfile stopped, there must be zeros to the end, at least two blocks."""
    file.seek(at)
    block = file.read(BLOCK)
    if not block:
        raise _Refused(
            f"truncated at offset {at}, between two members: the end marker of two zero blocks is missing; {_RESTORE}"
        )
    if any(block):
        what = "damaged header" if len(block) == BLOCK else "truncated inside the header"
        raise _Refused(f"{what} at offset {at}; {_RESTORE}")
    position = at
    while block:
        if data := block.lstrip(b"\0"):
            found = position + len(block) - len(data)
            raise _Refused(f"zeroed block at offset {at}, with data after it from offset {found}; {_RESTORE}")
        position += len(block)
        block = file.read(1 << 20)
    if length - at < 2 * BLOCK:
        raise _Refused(f"truncated at offset {length}, inside the end marker of two zero blocks; {_RESTORE}")


def _refuse_start(file: BinaryIO, length: int) -> None:
    """Raise the reason why a file has no readable header at its start."""
    file.seek(0)
    start = file.read(16)
    if start.startswith(COMPRESSED):
        raise _Refused("compressed, which allows no random access; decompress it, or stream it")
    if not start:
        raise _Refused(f"empty, at offset 0 a tar must have a header; {_RESTORE}")
    raise _Refused(f"not a tar, or damaged at offset 0: its {length} bytes begin with {start!r}; {_RESTORE}")


def _at(name: str, offset: int) -> str:
    """A member in a message; its name comes from the file and may be of any length and content."""
    return f"member {name[:200]!r} at offset {offset}"
