"""Walk a tar archive by its headers: USTAR, GNU and old GNU with sparse members, and pax names and sizes.

Member names are data: they are compared and shown, never used as paths.

Source: POSIX.1-2017 pax, "ustar Interchange Format"; GNU tar manual, "Basic Tar Format", "Old GNU Format", "Storing
Sparse Files".
"""

from __future__ import annotations

from array import array
from collections.abc import AsyncGenerator
from dataclasses import dataclass, replace

from pipeline.flow.items import RangeReader
from pipeline.units import KiB, round_up
from stages.decode.refusal import corrupt, unsupported

RECORD = 512
MEMBERS_MAX = 1024
# Long names and pax records. GNU tar writes a few hundred bytes.
_NOTE_MAX = 64 * KiB
# Stretches of a sparse member, 24 bytes of ours each. A disk of 100 GiB in use has some ten thousands.
SPARSE_MAX = 1 << 19
_REGULAR = frozenset({"0", "\0", "7"})
_SPARSE = "S"
_KINDS = {"1": "a hard link", "2": "a symbolic link", "3": "a device", "4": "a device", "6": "a pipe"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """A regular file in an archive. Offsets are archive bytes.

    Attributes:
        at: of its own header.
        data: where its bytes begin.
        stored: bytes in the archive; `size` where it is not sparse.
        stretches: offsets in the file, and bytes, of what is stored of a sparse file, in order; None: all of it.
    """

    name: str
    at: int
    data: int
    stored: int
    size: int
    stretches: tuple[array[int], array[int]] | None = None

    @property
    def end(self) -> int:
        """Archive offset behind it and its padding."""
        return self.data + round_up(self.stored, RECORD)


async def walk(reader: RangeReader, format: str) -> AsyncGenerator[Member, None]:
    """Every member, in order, up to the end mark or the end of the archive.

    Folders are passed over; links, devices and names that lead out of the folder are refused.

    Raises:
        FormatError: a header is damaged or hostile, or a member lies behind the end.
        StoreError: it can't be read.
    """
    at = 0
    members = 0
    name, size = "", -1
    while at + RECORD <= reader.size:
        header = await reader.read(at, RECORD)
        if not any(header):
            return
        member, kind = parse_header(header, at, format)
        members += 1
        if members > MEMBERS_MAX:
            raise corrupt(format, f"the archive has more than {MEMBERS_MAX} members", at)
        if kind == "S":
            member = await _read_sparse(reader, member, header, format)
        if kind in ("L", "x", "g"):
            name, size = await _read_note(reader, member, kind, name, size, format)
            at = member.end
            continue
        member = replace(member, name=name or member.name)
        if size >= 0:
            member = replace(member, stored=size, size=size if member.stretches is None else member.size)
        name, size = "", -1
        check_name(member.name, at, format)
        if member.data + member.stored > reader.size:
            raise corrupt(format, f"the member {member.name[:80]!r} lies behind the end of the archive", at)
        if kind != "5":
            yield member
        at = member.end


def parse_header(header: bytes, at: int, format: str) -> tuple[Member, str]:
    """A header, and the kind of its member. Long names and stretches are still missing."""
    if not has_checksum(header):
        raise corrupt(format, "the checksum of a tar header is wrong", at)
    kind = chr(header[156])
    if kind in _KINDS:
        raise unsupported(format, f"{_KINDS[kind]} in an archive", at + 156)
    if kind not in _REGULAR | {"5", "L", "x", "g", _SPARSE}:
        raise unsupported(format, f"a tar member of the kind {kind!r}", at + 156)
    size = _number(header[124:136], at + 124, format)
    if kind == "5":
        size = 0
    name = _text(header[:100])
    # Old GNU headers keep other fields where POSIX has a prefix.
    if header[257:263] == b"ustar\0" and (prefix := _text(header[345:500])):
        name = f"{prefix}/{name}"
    return Member(name=name, at=at, data=at + RECORD, stored=size, size=size), kind


def has_checksum(header: bytes) -> bool:
    """Whether a record has the checksum of a tar header."""
    digits = header[148:156].strip(b" \0")
    if not digits or digits.strip(b"01234567"):
        return False
    rest = header[:148] + b" " * 8 + header[156:]
    # Some old writers summed signed bytes.
    return int(digits, 8) in (sum(rest), sum(byte - 256 if byte > 127 else byte for byte in rest))


def check_name(name: str, at: int, format: str) -> None:
    """Refuse a name that leads out of the archive's folder."""
    if not name or name.startswith("/") or "\0" in name or ".." in name.replace("\\", "/").split("/"):
        raise corrupt(format, f"a member has the name {name[:80]!r}, which leads out of the archive", at)


def _number(field: bytes, at: int, format: str) -> int:
    """An octal number, or one in base 256 where the first bit is set."""
    if field[0] & 0x80:
        value = int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
        if field[0] & 0x40 or value >= 1 << 63:
            raise corrupt(format, "a number in a tar header is negative or absurdly large", at)
        return value
    digits = field.strip(b" \0")
    if digits.strip(b"01234567"):
        raise corrupt(format, "a number in a tar header is not octal", at)
    return int(digits or b"0", 8)


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


async def _read_note(
    reader: RangeReader, member: Member, kind: str, name: str, size: int, format: str
) -> tuple[str, int]:
    """Name and size that a long-name or pax member gives to the next one."""
    if member.stored > _NOTE_MAX:
        raise corrupt(format, f"a tar note of {member.stored} bytes is larger than any name needs", member.at)
    if member.data + member.stored > reader.size:
        raise corrupt(format, "the archive ends inside a tar note", member.at)
    raw = await reader.read(member.data, member.stored)
    if kind == "L":
        return _text(raw), size
    if kind == "g":
        return name, size
    position = 0
    while position < len(raw):
        digits = raw[position : position + 8].split(b" ", 1)[0]
        length = int(digits) if digits.isdigit() else 0
        if not len(digits) + 2 <= length <= len(raw) - position:
            raise corrupt(format, "a pax record has an impossible length", member.data + position)
        key, _, value = raw[position + len(digits) + 1 : position + length - 1].partition(b"=")
        if key == b"path":
            name = _text(value)
        elif key == b"size" and value.isdigit() and len(value) < 20:
            size = int(value)
        elif key.startswith(b"GNU.sparse"):
            raise unsupported(format, "a sparse tar member in pax format", member.at, hint="Use tar --format=oldgnu.")
        position += length
    return name, size


async def _read_sparse(reader: RangeReader, member: Member, header: bytes, format: str) -> Member:
    """The map of an old GNU sparse member: 4 stretches in its header, 21 in each record that follows."""
    size = _number(header[483:495], member.at + 483, format)
    data = member.data
    starts, lengths = array("Q"), array("Q")
    end = stored = 0
    is_over = False
    fields, has_more = header[386:482], header[482]
    while True:
        for start in range(0, len(fields), 24):
            if not fields[start : start + 24].strip(b"\0"):
                break
            offset = _number(fields[start : start + 12], data, format)
            length = _number(fields[start + 12 : start + 24], data, format)
            if is_over or offset < end or offset + length > size:
                raise corrupt(format, "the map of a sparse member is not in order", member.at)
            end = offset + length
            stored += length
            is_over = not length  # the last one may mark the end of the file
            if length:
                starts.append(offset)
                lengths.append(length)
        if not has_more:
            break
        if len(starts) > SPARSE_MAX:
            raise corrupt(format, f"a sparse member has more than {SPARSE_MAX} stretches", member.at)
        record = await reader.read(data, RECORD)
        fields, has_more = record[:504], record[504]
        data += RECORD
        if has_more and not any(fields[-24:]):
            raise corrupt(format, "the map of a sparse member goes on behind its end", data)
    if stored != member.stored:
        raise corrupt(format, "the map of a sparse member and its size contradict each other", member.at)
    return replace(member, data=data, size=size, stretches=(starts, lengths))
