"""The used clusters of FAT12, FAT16 and FAT32: every FAT entry that is not zero.

Source: Microsoft FAT32 File System Specification 1.03, sections "Boot Sector and BPB" and "FAT Data Structure".
"""

from __future__ import annotations

import struct

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import FormatError
from pipeline.flow.items import RangeReader
from pipeline.units import MiB
from stages.disk.signatures import fat_kind
from stages.disk.usage import RangeSet, Refusal, UsedMap, set_runs, take_witness

# A multiple of three, so that no FAT12 entry is cut; each byte read costs a few more while it is looked at.
_READ = 3 * MiB


async def map_fat(reader: RangeReader, kind: str, *, frozen: bool = False) -> UsedMap | Refusal:
    """Read the file allocation table.

    Raises:
        FormatError: it is damaged.
    """
    boot = await reader.read(0, 512)
    kind_found = fat_kind(boot)
    if kind_found is None:
        raise FormatError("there is no FAT boot sector")
    sector, per_cluster, reserved, fats, root = struct.unpack_from("<HBHBH", boot, 11)
    total = struct.unpack_from("<H", boot, 19)[0] or struct.unpack_from("<I", boot, 32)[0]
    fat_size = struct.unpack_from("<H", boot, 22)[0] or struct.unpack_from("<I", boot, 36)[0]
    begin = reserved + fats * fat_size + -(-root * 32 // sector)
    clusters = (total - begin) // per_cluster
    bits = {"fat12": 12, "fat16": 16, "fat32": 32}[kind_found]
    length = -(-(clusters + 2) * bits // 8)
    if total * sector > reader.size:
        raise FormatError(f"the filesystem has {total * sector} bytes, its partition {reader.size}")
    if length > fat_size * sector:
        raise FormatError("its FAT is too short for its clusters")
    if boot[65 if bits == 32 else 37] & 3:
        return Refusal(kind, "it is not clean: it is mounted or was not unmounted")
    active, mirrored = 0, fats > 1
    if bits == 32 and boot[40] & 0x80:
        active, mirrored = boot[40] & 0x0F, False
        if active >= fats:
            raise FormatError("its active FAT is none that it has")
    places = [(reserved + number * fat_size) * sector for number in range(fats)]
    mark = int.from_bytes(await reader.read(places[active] + bits // 8, 4), "little")
    # Both "no error" marks are ones; FAT12 has none.
    if (bits == 16 and mark & 0xC000 != 0xC000) or (bits == 32 and mark & 0x0C000000 != 0x0C000000):
        return Refusal(kind, "it is not clean: it is mounted or was not unmounted")
    ranges = RangeSet(reader.size)
    ranges.add(0, begin * sector)
    data_end = (begin + clusters * per_cluster) * sector
    ranges.add(data_end, reader.size - data_end)
    unit = per_cluster * sector
    used = 0
    for at in range(0, length, _READ):
        part = await reader.read(places[active] + at, min(_READ, length - at))
        if mirrored and await reader.read(places[1 - active] + at, len(part)) != part:
            return Refusal(kind, "its two FATs differ")
        first = at * 8 // bits - 2  # cluster numbers begin at 2
        flags = used_entries(part, bits)[: clusters - first]
        if first < 0:
            flags, first = flags[2:], 0
        used += int(flags.sum())
        starts, stops = set_runs(flags)
        ranges.add_many((starts + first) * unit + begin * sector, (stops + first) * unit + begin * sector)
    made, lengths = ranges.finish()
    return UsedMap(
        filesystem=kind,
        size=reader.size,
        starts=made,
        lengths=lengths,
        unit=unit,
        units_used=used,
        witness=await take_witness(reader, [(0, 512), (places[active], min(sector, length))]),
    )


def used_entries(part: bytes, bits: int) -> NDArray[np.uint8]:
    """One for every entry that is not zero."""
    entries: NDArray[np.uint32]
    if bits == 16:
        entries = np.frombuffer(part[: len(part) // 2 * 2], "<u2").astype(np.uint32)
    elif bits == 32:
        entries = np.frombuffer(part[: len(part) // 4 * 4], np.dtype("<u4")) & np.uint32(0x0FFFFFFF)
    else:
        whole = np.frombuffer(part.ljust(-(-len(part) // 3) * 3, b"\0"), np.uint8).reshape(-1, 3).astype(np.uint32)
        low = whole[:, 0] | (whole[:, 1] & 0x0F) << 8
        high = whole[:, 1] >> 4 | whole[:, 2] << 4
        entries = np.stack((low, high), axis=1).reshape(-1)
    return np.asarray(entries != 0).view(np.uint8)
