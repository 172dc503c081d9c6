"""Exact cuts: which bytes of a disk an export copies, and the partition table that fits them.

A cut is a pure function of the table. What changes in the table comes back as overlays for the stream; the disk is
never written. Boot code, disk signature, GUIDs and PARTUUIDs stay; so do the numbers of the partitions that are kept.

Source: UEFI Specification 2.10, sections 5.2 "LBA 0 Format" and 5.3 "GUID Partition Table (GPT) Disk Layout".
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Collection
from dataclasses import dataclass

from pipeline.errors import PlanError
from pipeline.units import MiB, round_up
from stages.disk.tables import (
    ENTRIES_AT,
    EXTENDED_TYPES,
    PROTECTIVE,
    BootRecord,
    GptHeader,
    Partition,
    PartitionTable,
    mbr_entries,
)


@dataclass(frozen=True, slots=True)
class Overlay:
    """Bytes that the image holds at `offset` instead of the disk's."""

    offset: int
    data: bytes

    @property
    def end(self) -> int:
        """Offset of the first byte behind it."""
        return self.offset + len(self.data)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """What an export of a part of a disk consists of. All in bytes.

    Attributes:
        size: of the virtual disk that results.
        copied: the image takes [0, copied) from the disk; what follows up to `size` is zero.
        overlays: ascending, without overlap; they win over disk, zeros and `skipped`.
        skipped: (offset, length) of dropped partitions inside [0, copied), ascending: they read as zero.
        kept, dropped: numbers of partitions.
    """

    size: int
    copied: int
    overlays: tuple[Overlay, ...]
    skipped: tuple[tuple[int, int], ...]
    kept: tuple[int, ...]
    dropped: tuple[int, ...]


def cut_disk(
    table: PartitionTable,
    *,
    partitions: Collection[int] | None = None,
    through: int | None = None,
    stop: int | None = None,
    alignment: int = MiB,
    size_min: int = 0,
) -> Cut:
    """Decide what to copy and rewrite the table for it.

    At most one of `partitions`, `through` and `stop` is given; none of them keeps everything.

    Args:
        partitions: numbers to keep; the others are dropped, also where they lie between kept ones.
        through: keep everything up to the end of this partition, in the order on the disk.
        stop: keep [0, stop) bytes.
        alignment: the size is rounded up to a multiple of it (bytes).
        size_min: the size is at least this (bytes).
    Raises:
        PlanError: there is no such partition, or the cut would break one or change the number of a kept one; the hint
            names the smallest cut that works.
    """
    if sum(choice is not None for choice in (partitions, through, stop)) > 1:
        raise ValueError("a cut takes one of partitions, through and stop")
    everything = partitions is None and through is None and stop is None
    numbers = {one.number for one in table.partitions}
    wanted = set(partitions or ()) | ({through} if through is not None else set())
    if missing := sorted(wanted - numbers):
        raise PlanError(
            f"there is no partition {missing[0]} on the disk",
            operation="cut",
            hint=f"There are {', '.join(map(str, sorted(numbers)))}." if numbers else "It has no partition table.",
        )
    if table.kind == "protective" and not everything:
        raise PlanError(
            "the disk can't be cut: its GPT can't be read",
            operation="cut",
            hint="Repair it with `sgdisk --verify` and the recovery menu of gdisk, or export the whole disk.",
        )
    sector = table.sector_size
    if everything:
        kept = numbers
        end = table.disk_size
    elif stop is not None:
        if not 0 < stop <= table.disk_size:
            raise PlanError(f"the disk has {table.disk_size} bytes, a cut at {stop} is not inside it", operation="cut")
        end = stop
        kept = {one.number for one in table.partitions if not one.is_extended and one.end <= end}
    elif through is not None:
        end = _end_of(table, {through})
        kept = {one.number for one in table.partitions if not one.is_extended and one.end <= end}
    else:
        kept = wanted | {one.number for one in table.partitions if one.is_logical and _boxes(table, one) & wanted}
        end = _end_of(table, kept)
    kept -= {one.number for one in table.partitions if one.is_extended}
    end = max(end, sector)
    if not everything:
        _check_sound(table, kept, end)
        if table.boot_records:
            _check_logical(table, kept, end)
            end = _reach_records(table, kept, end)
    copied = min(end, table.disk_size)
    overlays: tuple[Overlay, ...] = ()
    if everything or stop is not None or table.gpt is None:
        size_min = max(size_min, copied)
    size = round_up(max(size_min, copied), alignment)
    if table.gpt is not None and not (everything and size == table.disk_size):
        if everything:
            # Behind its last usable sector the disk has its own backup; the image gets a new one, at its own end.
            copied = min(copied, (table.gpt.last_usable + 1) * sector)
        size, copied, overlays = _cut_gpt(table, table.gpt, kept, copied, size_min, alignment)
    elif table.kind == "mbr" and not everything:
        overlays = _cut_mbr(table, kept, copied)
    dropped = numbers - kept - {one.number for one in table.partitions if one.is_extended}
    return Cut(
        size=size,
        copied=copied,
        overlays=tuple(sorted(overlays, key=lambda one: one.offset)),
        skipped=_skipped(table, kept, copied),
        kept=tuple(sorted(kept)),
        dropped=tuple(sorted(dropped)),
    )


@dataclass(frozen=True, slots=True)
class GuideCount:
    """The arithmetic of `dd ... count=` for a cut behind one partition.

    Attributes:
        last_sector: inclusive, as fdisk prints it.
        size: bytes up to the end of the partition.
        command: `bs=` and `count=` that copy exactly these bytes.
        trap: why the count that is written in the guide is wrong.
    """

    last_sector: int
    size: int
    command: str
    trap: str

    @property
    def mib(self) -> int:
        """The size in MiB, rounded up."""
        return -(-self.size // MiB)


def guide_count(table: PartitionTable, number: int) -> GuideCount:
    """How many bytes dd has to copy so that the partition is whole. Raises PlanError when there is no such one."""
    size = cut_disk(table, through=number, alignment=1).copied
    mib = -(-size // MiB)
    exact = f"bs=1M count={mib}" if size % MiB == 0 else f"bs={table.sector_size} count={size // table.sector_size}"
    return GuideCount(
        last_sector=size // table.sector_size - 1,
        size=size,
        command=exact,
        trap=(
            f"bs=1K count={mib}M copies {mib * MiB} blocks of 1 KiB, 1024 times too much: the suffix multiplies the "
            "number of blocks. And the end sector is inclusive: (end + 1) sectors."
        ),
    )


def _end_of(table: PartitionTable, numbers: Collection[int]) -> int:
    return max((one.end for one in table.partitions if one.number in numbers), default=0)


def _boxes(table: PartitionTable, logical: Partition) -> set[int]:
    """Numbers of the extended partitions that a logical one lies in."""
    return {one.number for one in table.partitions if one.is_extended and one.start <= logical.start < one.end}


def _check_sound(table: PartitionTable, kept: set[int], end: int) -> None:
    """A table is rewritten only where it is understood."""
    broken = [
        problem for problem in table.problems if "overlap" in problem or "chain" in problem or "boot record" in problem
    ]
    if broken:
        raise PlanError(
            f"the partition table is damaged and can't be rewritten: {broken[0]}",
            operation="cut",
            hint="Export the whole disk, or repair the table first (`sfdisk --verify`).",
        )
    for one in table.partitions:
        if one.is_extended:
            continue
        if one.start < end < one.end:
            raise PlanError(
                f"the cut at byte {end} goes through partition {one.number}",
                operation="cut",
                start=one.start,
                end=one.end,
                hint=f"The smallest cut that works is through = {one.number} ({one.end} bytes).",
            )
        if one.number in kept and one.end > table.disk_size:
            raise PlanError(
                f"partition {one.number} ends behind the end of the disk", operation="cut", hint="Repair the table."
            )


def _check_logical(table: PartitionTable, kept: set[int], end: int) -> None:
    """Logical partitions are numbered by their place in the chain: only its tail can be dropped."""
    if sum(one.is_extended for one in table.partitions) > 1:
        raise PlanError("a disk with two extended partitions can't be cut", operation="cut")
    chain = [record.number for record in table.boot_records if record.number]
    last = max((index for index, number in enumerate(chain) if number in kept), default=-1)
    for number in chain[: max(last, 0)]:
        if number not in kept:
            needed = {*kept, *chain[:last]}
            raise PlanError(
                f"without partition {number}, partition {chain[last]} would get another number",
                operation="cut",
                hint=f"The smallest cut that works is partitions = {sorted(needed)}.",
            )


def _reach_records(table: PartitionTable, kept: set[int], end: int) -> int:
    """The cut moved behind the boot records that kept logical partitions need."""
    sector = table.sector_size
    for record in _kept_records(table, kept):
        if record.lba * sector >= end:
            end = (record.lba + 1) * sector
    return end


def _kept_records(table: PartitionTable, kept: set[int]) -> list[BootRecord]:
    last = max((index for index, record in enumerate(table.boot_records) if record.number in kept), default=-1)
    return list(table.boot_records[: last + 1])


def _cut_mbr(table: PartitionTable, kept: set[int], end: int) -> tuple[Overlay, ...]:
    """The MBR without the dropped entries, and the last boot record of a shortened chain."""
    sector = table.sector_size
    mbr = bytearray(table.mbr)
    records = _kept_records(table, kept)
    for slot, entry in enumerate(mbr_entries(table.mbr)):
        at = ENTRIES_AT + 16 * slot
        if not entry.is_used:
            continue
        if entry.type in EXTENDED_TYPES:
            if not records:
                mbr[at : at + 16] = bytes(16)
            elif (entry.start + entry.count) * sector > end:
                struct.pack_into("<I", mbr, at + 12, end // sector - entry.start)
        elif slot + 1 not in kept:
            mbr[at : at + 16] = bytes(16)
    overlays = [Overlay(0, bytes(mbr))] if mbr != table.mbr else []
    if records and len(records) < len(table.boot_records):
        data = bytearray(records[-1].data)
        for slot, entry in enumerate(mbr_entries(records[-1].data)):
            if entry.is_used and entry.type in EXTENDED_TYPES:
                data[ENTRIES_AT + 16 * slot : ENTRIES_AT + 16 * slot + 16] = bytes(16)
        overlays.append(Overlay(records[-1].lba * sector, bytes(data)))
    return tuple(overlays)


def _cut_gpt(
    table: PartitionTable,
    gpt: GptHeader,
    kept: set[int],
    copied: int,
    size_min: int,
    alignment: int,
) -> tuple[int, int, tuple[Overlay, ...]]:
    """(size, copied, overlays): both headers and arrays with their checksums, and the MBR's entries.

    Takes what to copy where nothing else needs the place; the copy that comes back ends where the backup begins.
    """
    sector = table.sector_size
    array_sectors = -(-len(gpt.entries) // sector)
    tail = (array_sectors + 1) * sector
    primary_array = gpt.entries_lba if gpt.my_lba == 1 else 2
    used = max(_end_of(table, kept), gpt.first_usable * sector, (primary_array + array_sectors) * sector)
    size = round_up(max(used + tail, size_min), math.lcm(alignment, sector))
    last = size // sector - 1
    backup_array = last - array_sectors
    copied = min(max(copied, used), backup_array * sector, table.disk_size)
    entries = bytearray(gpt.entries)
    for index in range(gpt.entry_count):
        if index + 1 not in kept:
            entries[index * gpt.entry_size : (index + 1) * gpt.entry_size] = bytes(gpt.entry_size)
    array = bytes(entries)
    overlays = [
        Overlay(sector, _header(gpt, sector, 1, last, primary_array, backup_array - 1, array)),
        Overlay(primary_array * sector, array),
        Overlay(backup_array * sector, array),
        Overlay(last * sector, _header(gpt, sector, last, 1, backup_array, backup_array - 1, array)),
    ]
    mbr = _protective(table, kept, last)
    if mbr != table.mbr:
        overlays.append(Overlay(0, mbr))
    return size, copied, tuple(overlays)


def _header(
    gpt: GptHeader, sector: int, mine: int, alternate: int, array_lba: int, last_usable: int, array: bytes
) -> bytes:
    """One sector with a header that has the disk's GUID, revision and first usable sector."""
    raw = bytearray(gpt.raw)
    struct.pack_into("<IIQQ", raw, 16, 0, 0, mine, alternate)
    struct.pack_into("<Q", raw, 48, last_usable)
    struct.pack_into("<Q", raw, 72, array_lba)
    struct.pack_into("<I", raw, 88, zlib.crc32(array))
    struct.pack_into("<I", raw, 16, zlib.crc32(raw))
    return bytes(raw).ljust(sector, b"\0")


def _protective(table: PartitionTable, kept: set[int], last: int) -> bytes:
    """The MBR in front of a GPT: its protective entry ends with the disk, a hybrid's others follow their partitions."""
    mbr = bytearray(table.mbr)
    sector = table.sector_size
    starts = {one.start for one in table.partitions if one.number in kept}
    for slot, entry in enumerate(mbr_entries(table.mbr)):
        at = ENTRIES_AT + 16 * slot
        if not entry.is_used:
            continue
        if entry.type == PROTECTIVE:
            # A hybrid's protective entry may cover only the GPT itself; then it stays as it is.
            if table.kind == "gpt" or entry.start + entry.count > last + 1:
                struct.pack_into("<I", mbr, at + 12, min(last - entry.start + 1, 0xFFFFFFFF))
        elif entry.start * sector not in starts:
            mbr[at : at + 16] = bytes(16)
    return bytes(mbr)


def _skipped(table: PartitionTable, kept: set[int], copied: int) -> tuple[tuple[int, int], ...]:
    """Where dropped partitions lie inside what is copied."""
    found = [
        (one.start, min(one.end, copied) - one.start)
        for one in table.partitions
        if not one.is_extended and one.number not in kept and one.start < copied
    ]
    return tuple(sorted(found))
