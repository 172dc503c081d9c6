"""Partition tables: what is on the disk, every structure checked, nothing believed.

A damaged table is not an error here: what could be read is returned, with every fault in `problems`. Numbers and chains
are bounded before they are followed.

Source: UEFI Specification 2.10, section 5 "GUID Partition Table (GPT) Disk Layout"; for extended boot records the
behaviour of the Linux kernel and util-linux (partitions are numbered as they do).
"""

from __future__ import annotations

import struct
import uuid
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from pipeline.errors import FormatError
from pipeline.flow.items import RangeReader
from pipeline.units import MiB

MBR_SIZE = 512
ENTRIES_AT = 446
DISK_ID_AT = 440
EXTENDED_TYPES = frozenset({0x05, 0x0F, 0x85})
PROTECTIVE = 0xEE
_SIGNATURE = b"\x55\xaa"
# The kernel has room for 256 partitions on a disk; a longer chain is a loop or an attack.
_EBR_MAX = 256

GPT_MAGIC = b"EFI PART"
GPT_HEADER = struct.Struct("<8sIIIIQQQQ16sQIII")
_GPT_ENTRY = struct.Struct("<16s16sQQQ72s")
# 128 entries of 128 bytes are what every tool writes; 4 MiB are 32768 of them.
_GPT_ENTRIES_BYTES_MAX = 4 * MiB

TableKind = Literal["none", "mbr", "gpt", "hybrid", "protective"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Partition:
    """One partition. Offsets and lengths are bytes of the disk.

    Attributes:
        number: as Linux numbers it (sda3 is 3).
        type: `0x83`, or a GUID in lower case.
        uuid: the PARTUUID, as Linux makes it.
        attributes: the GPT's 64 bits; 0 in an MBR.
        is_extended: only a container of logical partitions.
        is_logical: lives in an extended partition.
    """

    number: int
    start: int
    length: int
    type: str
    name: str = ""
    uuid: str = ""
    bootable: bool = False
    attributes: int = 0
    is_extended: bool = False
    is_logical: bool = False

    @property
    def end(self) -> int:
        """Offset of the first byte behind it."""
        return self.start + self.length

    @property
    def type_name(self) -> str:
        """The type in words, the bare type where it is not known."""
        return TYPE_NAMES.get(self.type, self.type)


@dataclass(frozen=True, slots=True, kw_only=True)
class BootRecord:
    """An extended boot record: the head of one logical partition and the link to the next.

    Attributes:
        lba: where it is, in sectors.
        data: its 512 bytes.
        number: of the logical partition that it describes; 0 where it describes none.
    """

    lba: int
    data: bytes
    number: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GptHeader:
    """One of the two GPT headers, checked. LBAs are sectors.

    Attributes:
        raw: the header as it is on the disk, `header_size` bytes.
        entries: the whole array of entries.
    """

    my_lba: int
    alternate_lba: int
    first_usable: int
    last_usable: int
    disk_guid: bytes
    entries_lba: int
    entry_count: int
    entry_size: int
    raw: bytes
    entries: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class PartitionTable:
    """The partition table of a disk.

    Attributes:
        kind: `protective` is an MBR that announces a GPT which is not there or can't be read.
        sector_size: in bytes, 512 or 4096.
        disk_size: in bytes.
        partitions: in the order of their numbers; with a GPT the GPT's, whatever a hybrid MBR says.
        disk_signature: the GPT's disk GUID, or the MBR's 8 hexadecimal digits.
        boot_code: whether the first sector holds code.
        metadata: (offset, length) in bytes of every sector that belongs to the table, ascending.
        problems: what is wrong with it, in sentences.
        mbr: the first 512 bytes.
        boot_records: the EBR chain as it is linked.
        gpt: the header that is believed: the primary if it is sound, else the backup.
        backup_is_sound: whether the backup header and its entries check out and agree with the primary.
    """

    kind: TableKind
    sector_size: int
    disk_size: int
    partitions: tuple[Partition, ...] = ()
    disk_signature: str = ""
    boot_code: bool = False
    metadata: tuple[tuple[int, int], ...] = ()
    problems: tuple[str, ...] = ()
    mbr: bytes = b""
    boot_records: tuple[BootRecord, ...] = ()
    gpt: GptHeader | None = None
    backup_is_sound: bool = False

    def partition(self, number: int) -> Partition | None:
        """The partition of that number."""
        return next((one for one in self.partitions if one.number == number), None)


@dataclass(frozen=True, slots=True)
class MbrEntry:
    """One of the four entries of a boot record. Sectors as the disk counts them."""

    flag: int
    type: int
    start: int
    count: int

    @property
    def is_used(self) -> bool:
        """Whether it describes anything."""
        return self.type != 0 and self.count != 0


def mbr_entries(sector: bytes) -> list[MbrEntry]:
    """The four entries of a master or extended boot record."""
    return [MbrEntry(*struct.unpack_from("<B3xB3xII", sector, ENTRIES_AT + 16 * slot)) for slot in range(4)]


async def read_table(reader: RangeReader, size: int, *, sector_size: int | None = None) -> PartitionTable:
    """Read the partition table of a disk.

    Args:
        size: of the disk in bytes.
        sector_size: what the device says. None: an image, where a GPT at byte 4096 tells a disk of 4096-byte sectors.
    Raises:
        StoreError: the disk can't be read.
    """
    if size < MBR_SIZE:
        return PartitionTable(kind="none", sector_size=sector_size or 512, disk_size=size)
    mbr = await reader.read(0, MBR_SIZE)
    for sector in (sector_size,) if sector_size else (512, 4096):
        if size < 2 * sector or (await reader.read(sector, 8)) != GPT_MAGIC:
            backup = size // sector * sector - sector
            if backup < sector or (await reader.read(backup, 8)) != GPT_MAGIC:
                continue
        table = await _read_gpt(reader, size, sector, mbr)
        if table is not None:
            return table
    return await _read_mbr(reader, size, sector_size or 512, mbr)


def _has_code(mbr: bytes) -> bool:
    return any(mbr[:DISK_ID_AT])


def _is_record(sector: bytes) -> bool:
    """Whether it is a boot record: signed, and every entry's flag is one that a boot record may have."""
    return sector[510:512] == _SIGNATURE and all(entry.flag & 0x7F == 0 for entry in mbr_entries(sector))


def _is_filesystem(mbr: bytes) -> bool:
    """Whether the first sector belongs to a FAT or NTFS that fills the whole disk."""
    return mbr[3:11] in (b"NTFS    ", b"EXFAT   ") or mbr[54:59] in (b"FAT12", b"FAT16") or mbr[82:87] == b"FAT32"


# -- MBR --------------------------------------------------------------------------------------------------------------


async def _read_mbr(reader: RangeReader, size: int, sector: int, mbr: bytes) -> PartitionTable:
    none = PartitionTable(kind="none", sector_size=sector, disk_size=size, mbr=mbr, boot_code=_has_code(mbr))
    if not _is_record(mbr):
        return none
    entries = mbr_entries(mbr)
    if not any(entry.is_used for entry in entries) and _is_filesystem(mbr):
        return none
    disk_id = struct.unpack_from("<I", mbr, DISK_ID_AT)[0]
    if any(entry.type == PROTECTIVE for entry in entries):
        return replace(
            none,
            kind="protective",
            disk_signature=f"{disk_id:08x}",
            metadata=((0, sector),),
            problems=("the MBR announces a GPT, but neither of its headers can be read",),
        )
    problems: list[str] = []
    partitions: list[Partition] = []
    records: list[BootRecord] = []
    for slot, entry in enumerate(entries, 1):
        if entry.type == 0 and entry.count == 0:
            continue
        if not entry.is_used:
            problems.append(f"entry {slot} of the MBR is half empty and is ignored")
            continue
        partitions.append(
            Partition(
                number=slot,
                start=entry.start * sector,
                length=entry.count * sector,
                type=f"0x{entry.type:02x}",
                uuid=f"{disk_id:08x}-{slot:02x}",
                bootable=bool(entry.flag & 0x80),
                is_extended=entry.type in EXTENDED_TYPES,
            )
        )
    for extended in [one for one in partitions if one.is_extended]:
        logical = await _read_chain(reader, size, sector, extended, records, problems, disk_id)
        partitions += logical
    problems += _layout_problems(partitions, size)
    return PartitionTable(
        kind="mbr",
        sector_size=sector,
        disk_size=size,
        partitions=tuple(partitions),
        disk_signature=f"{disk_id:08x}",
        boot_code=_has_code(mbr),
        metadata=_metadata([(0, sector), *((record.lba * sector, sector) for record in records)]),
        problems=tuple(problems),
        mbr=mbr,
        boot_records=tuple(records),
    )


async def _read_chain(
    reader: RangeReader,
    size: int,
    sector: int,
    extended: Partition,
    records: list[BootRecord],
    problems: list[str],
    disk_id: int,
) -> list[Partition]:
    """Follow the chain of extended boot records; stops with a problem where it loops, breaks or leaves the disk."""
    base = extended.start // sector
    found: list[Partition] = []
    seen = {record.lba for record in records}
    lba: int | None = base
    while lba is not None:
        if lba in seen:
            problems.append(f"the chain of logical partitions loops at sector {lba}")
            break
        if len(seen) >= _EBR_MAX:
            problems.append(f"the chain of logical partitions is longer than {_EBR_MAX}")
            break
        seen.add(lba)
        if not extended.start <= lba * sector < extended.end:
            problems.append(f"the chain of logical partitions leaves the extended partition at sector {lba}")
        if lba * sector + MBR_SIZE > size:
            problems.append(f"the chain of logical partitions leaves the disk at sector {lba}")
            break
        data = await reader.read(lba * sector, MBR_SIZE)
        if data[510:512] != _SIGNATURE:
            problems.append(f"there is no extended boot record at sector {lba}")
            break
        number = 0
        following: int | None = None
        entries = mbr_entries(data)
        for entry in entries:
            if not entry.is_used:
                continue
            if entry.type in EXTENDED_TYPES:
                if following is None:
                    following = base + entry.start
                else:
                    problems.append(f"the extended boot record at sector {lba} has two successors")
                continue
            if number:
                problems.append(f"the extended boot record at sector {lba} describes two partitions")
                continue
            number = 5 + sum(1 for record in records if record.number)
            found.append(
                Partition(
                    number=number,
                    start=(lba + entry.start) * sector,
                    length=entry.count * sector,
                    type=f"0x{entry.type:02x}",
                    uuid=f"{disk_id:08x}-{number:02x}",
                    bootable=bool(entry.flag & 0x80),
                    is_logical=True,
                )
            )
            if not (extended.start < found[-1].start and found[-1].end <= extended.end):
                problems.append(f"logical partition {number} is not inside the extended partition")
        records.append(BootRecord(lba=lba, data=data, number=number))
        lba = following
    return found


def _layout_problems(partitions: list[Partition], size: int) -> list[str]:
    """Partitions that overlap or leave the disk."""
    problems = []
    by_start = sorted((one for one in partitions if not one.is_extended), key=lambda one: (one.start, one.end))
    reach: Partition | None = None
    for one in by_start:
        if one.start == 0:
            problems.append(f"partition {one.number} covers the partition table")
        if one.end > size:
            problems.append(f"partition {one.number} ends {one.end - size} bytes behind the end of the disk")
        if reach is not None and one.start < reach.end:
            problems.append(f"partitions {reach.number} and {one.number} overlap")
        if reach is None or one.end > reach.end:
            reach = one
    for box in (one for one in partitions if one.is_extended):
        if box.start == 0:
            problems.append(f"partition {box.number} covers the partition table")
        if box.end > size:
            problems.append(f"partition {box.number} ends {box.end - size} bytes behind the end of the disk")
        problems += [
            f"partitions {box.number} and {one.number} overlap"
            for one in partitions
            if not one.is_logical and one is not box and one.start < box.end and box.start < one.end
        ]
    return problems


def overlapping(parts: Sequence[Partition]) -> set[int]:
    """Numbers of the partitions that share bytes with another."""
    found: set[int] = set()
    reach: Partition | None = None
    for one in sorted(parts, key=lambda part: (part.start, part.end)):
        if reach is not None and one.start < reach.end:
            found |= {one.number, reach.number}
        if reach is None or one.end > reach.end:
            reach = one
    return found


# -- GPT --------------------------------------------------------------------------------------------------------------


async def _read_gpt(reader: RangeReader, size: int, sector: int, mbr: bytes) -> PartitionTable | None:
    """The GPT with the given sector size; None where neither header is sound, or the MBR says it is not in force."""
    problems: list[str] = []
    last_lba = size // sector - 1
    metadata = [(0, sector)]
    is_record = _is_record(mbr)
    entries = [entry for entry in mbr_entries(mbr) if entry.is_used] if is_record else []
    if entries and not any(entry.type == PROTECTIVE for entry in entries):
        return None  # Linux takes the MBR then: a GPT that an older tool left is not in force.
    primary = await _read_header(reader, size, sector, 1, "primary", problems)
    backup_lba = primary.alternate_lba if primary is not None else last_lba
    backup = await _read_header(reader, size, sector, backup_lba, "backup", problems)
    if primary is not None and backup_lba != last_lba:
        problems.append(f"the backup GPT is at sector {backup_lba}, not in the disk's last sector {last_lba}")
        if backup is None and backup_lba != last_lba:
            backup = await _read_header(reader, size, sector, last_lba, "backup", [])
    believed = primary or backup
    if believed is None:
        return None
    agree = (
        primary is not None
        and backup is not None
        and (primary.disk_guid, primary.entries, primary.first_usable, primary.last_usable, primary.my_lba)
        == (backup.disk_guid, backup.entries, backup.first_usable, backup.last_usable, backup.alternate_lba)
    )
    if primary is not None and backup is not None and not agree:
        problems.append("the primary and the backup GPT differ; the primary is believed")
    if not is_record:
        problems.append("there is no protective MBR, so Linux does not see this GPT")
    elif not entries:
        problems.append("the MBR is empty, so Linux does not see this GPT")
    for header in (primary, backup):
        if header is not None:
            metadata.append((header.my_lba * sector, sector))
            metadata.append((header.entries_lba * sector, -(-len(header.entries) // sector) * sector))
    partitions = _gpt_partitions(believed, sector, size, problems)
    problems += _layout_problems(partitions, size)
    return PartitionTable(
        kind="hybrid" if len(entries) > 1 else "gpt",
        sector_size=sector,
        disk_size=size,
        partitions=tuple(partitions),
        disk_signature=_guid(believed.disk_guid),
        boot_code=_has_code(mbr),
        metadata=_metadata([(start, length) for start, length in metadata if start + length <= size]),
        problems=tuple(problems),
        mbr=mbr,
        gpt=believed,
        backup_is_sound=agree,
    )


async def _read_header(
    reader: RangeReader, size: int, sector: int, lba: int, which: str, problems: list[str]
) -> GptHeader | None:
    """Read and check one header and its entries; None with a problem where anything is wrong."""
    try:
        return await _check_header(reader, size, sector, lba)
    except FormatError as error:
        problems.append(f"the {which} GPT is not sound: {error.message}")
        return None


async def _check_header(reader: RangeReader, size: int, sector: int, lba: int) -> GptHeader:
    if lba < 1 or (lba + 1) * sector > size:
        raise FormatError(f"its header would be in sector {lba}, outside of the disk")
    data = await reader.read(lba * sector, sector)
    magic, _revision, length, crc, _zero, mine, alternate, first, last, guid, array, count, each, array_crc = (
        GPT_HEADER.unpack_from(data)
    )
    if magic != GPT_MAGIC:
        raise FormatError(f"sector {lba} holds no header")
    if not GPT_HEADER.size <= length <= sector:
        raise FormatError(f"its header claims a length of {length}")
    if zlib.crc32(data[:16] + bytes(4) + data[20:length]) != crc:
        raise FormatError("the checksum of its header is wrong")
    if mine != lba:
        raise FormatError(f"its header in sector {lba} says that it is in sector {mine}")
    if each < 128 or each > 4096 or each & (each - 1) or not 0 < count * each <= _GPT_ENTRIES_BYTES_MAX:
        raise FormatError(f"it claims {count} entries of {each} bytes")
    if array < 2 or array * sector + count * each > size:
        raise FormatError(f"its entries would begin in sector {array}, outside of the disk")
    entries = await reader.read(array * sector, count * each)
    if zlib.crc32(entries) != array_crc:
        raise FormatError("the checksum of its entries is wrong")
    return GptHeader(
        my_lba=mine,
        alternate_lba=alternate,
        first_usable=first,
        last_usable=last,
        disk_guid=guid,
        entries_lba=array,
        entry_count=count,
        entry_size=each,
        raw=data[:length],
        entries=entries,
    )


def _gpt_partitions(gpt: GptHeader, sector: int, size: int, problems: list[str]) -> list[Partition]:
    found = []
    empty = bytes(16)
    for index in range(gpt.entry_count):
        kind, unique, first, last, attributes, name = _GPT_ENTRY.unpack_from(gpt.entries, index * gpt.entry_size)
        if kind == empty:
            continue
        number = index + 1
        if last < first or last >= size // sector + (1 << 40):
            problems.append(f"partition {number} ends before it begins, or nowhere; it is ignored")
            continue
        if first < gpt.first_usable or last > gpt.last_usable:
            problems.append(f"partition {number} is outside of the sectors that the GPT calls usable")
        found.append(
            Partition(
                number=number,
                start=first * sector,
                length=(last - first + 1) * sector,
                type=_guid(kind),
                name=name.decode("utf-16-le", "replace").split("\0", 1)[0],
                uuid=_guid(unique),
                bootable=bool(attributes & 4),
                attributes=attributes,
            )
        )
    seen: set[str] = set()
    for one in found:
        if one.uuid in seen:
            problems.append(f"partition {one.number} has the PARTUUID of another one")
        seen.add(one.uuid)
    return found


def _guid(raw: bytes) -> str:
    return str(uuid.UUID(bytes_le=raw))


def _metadata(ranges: list[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    return tuple(sorted(set(ranges)))


TYPE_NAMES = {
    "0x01": "FAT12",
    "0x04": "FAT16 below 32 MiB",
    "0x05": "extended",
    "0x06": "FAT16",
    "0x07": "NTFS or exFAT",
    "0x0b": "FAT32",
    "0x0c": "FAT32 (LBA)",
    "0x0e": "FAT16 (LBA)",
    "0x0f": "extended (LBA)",
    "0x27": "Windows recovery",
    "0x82": "Linux swap",
    "0x83": "Linux",
    "0x85": "Linux extended",
    "0x8e": "Linux LVM",
    "0xee": "GPT protective",
    "0xef": "EFI system",
    "0xfd": "Linux RAID",
    "c12a7328-f81f-11d2-ba4b-00a0c93ec93b": "EFI system",
    "21686148-6449-6e6f-744e-656564454649": "BIOS boot",
    "0fc63daf-8483-4772-8e79-3d69d8477de4": "Linux filesystem",
    "0657fd6d-a4ab-43c4-84e5-0933c84b4f4f": "Linux swap",
    "e6d6d379-f507-44c2-a23c-238f2a3df928": "Linux LVM",
    "a19d880f-05fc-4d3b-a006-743f0f84911e": "Linux RAID",
    "933ac7e1-2eb4-4f13-b844-0e14e2aef915": "Linux home",
    "44479540-f297-41b2-9af7-d131d5f0458a": "Linux root (x86)",
    "4f68bce3-e8cd-4db1-96e7-fbcaf984b709": "Linux root (x86-64)",
    "b921b045-1df0-41c3-af44-4c6f280d3fae": "Linux root (ARM-64)",
    "bc13c2ff-59e6-4262-a352-b275fd6f7172": "Linux extended boot",
    "ca7d7ccb-63ed-4c53-861c-1742536059cc": "LUKS",
    "ebd0a0a2-b9e5-4433-87c0-68b6b72699c7": "Microsoft basic data",
    "e3c9e316-0b5c-4db8-817d-f92df00215ae": "Microsoft reserved",
    "de94bba4-06d1-4d40-a16a-bfd50179d6ac": "Windows recovery",
}
