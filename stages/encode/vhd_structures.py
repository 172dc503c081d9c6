"""The structures of a VHD: footer, dynamic header, block allocation table.

Source: Virtual Hard Disk Image Format Specification, "Hard Disk Footer Format", "Dynamic Disk Header Format",
"Block Allocation Table and Data Blocks", "CHS Calculation".
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Literal

from pipeline.units import MiB, round_up
from stages.encode.allocation import StoredUnits
from stages.encode.birth import Birth

SECTOR = 512
BLOCK = 2 * MiB
FOOTER_LENGTH = 512
HEADER_LENGTH = 1024
TABLE_OFFSET = FOOTER_LENGTH + HEADER_LENGTH
ABSENT = 0xFFFFFFFF
NO_OFFSET = 0xFFFFFFFFFFFFFFFF

# Data of a block begins at a whole page of the image, so that it can be written from where it lies. Its bitmap (all
# sectors present) comes right before it, and the rest of the page is left free; the table points at the bitmap.
PAGE = 4096
BLOCK_PREFIX = bytes(PAGE - SECTOR) + b"\xff" * SECTOR

# Readers take the disk's size from the footer for this creator, and from its cylinders, heads and sectors for others.
CREATOR = b"qem2"
CREATOR_VERSION = 0x00050003
CREATOR_HOST = b"Wi2k"

# Seconds from 1970 to the format's first day.
EPOCH = 946684800

# cookie, features, version, data offset, timestamp, creator (application, version, host), sizes (original, current),
# geometry, type, checksum, identifier
_FOOTER = struct.Struct(">8sIIQI4sI4sQQHBBII16s428x")
# cookie, data offset, table offset, version, entries, block size, checksum
_HEADER = struct.Struct(">8sQQIIII984x")


def footer(kind: Literal["dynamic", "fixed"], size: int, birth: Birth) -> bytes:
    """The 512 bytes at the end of every VHD, and at the start of a dynamic one too."""
    cylinders, heads, sectors = geometry(size)

    def pack(checksum: int) -> bytes:
        return _FOOTER.pack(
            b"conectix",
            2,
            0x00010000,
            FOOTER_LENGTH if kind == "dynamic" else NO_OFFSET,
            max(0, birth.time - EPOCH),
            CREATOR,
            CREATOR_VERSION,
            CREATOR_HOST,
            size,
            size,
            cylinders,
            heads,
            sectors,
            3 if kind == "dynamic" else 2,
            checksum,
            birth.uuid("vhd").bytes,
        )

    return pack(_checksum(pack(0)))


def dynamic_header(blocks: int) -> bytes:
    """The 1024 bytes behind the first footer."""

    def pack(checksum: int) -> bytes:
        return _HEADER.pack(b"cxsparse", NO_OFFSET, TABLE_OFFSET, 0x00010000, blocks, BLOCK, checksum)

    return pack(_checksum(pack(0)))


def table_length(blocks: int) -> int:
    """Bytes of the block allocation table, in whole sectors."""
    return round_up(4 * blocks, SECTOR)


def table(stored: StoredUnits, first: int) -> Iterator[bytes]:
    """The block allocation table: the sector of each stored block's bitmap.

    Args:
        first: image offset of the first block's prefix.
    """
    import numpy

    stride = (len(BLOCK_PREFIX) + BLOCK) // SECTOR
    bitmap = (first + len(BLOCK_PREFIX)) // SECTOR - 1
    for flags, ranks in stored.stretches():
        yield numpy.where(flags, bitmap + ranks * stride, ABSENT).astype(">u4").tobytes()
    yield b"\xff" * (table_length(stored.count) - 4 * stored.count)


def geometry(size: int) -> tuple[int, int, int]:
    """Cylinders, heads and sectors; the largest there are where none give the disk's size exactly.

    The largest make readers that go by geometry use the size instead.
    """
    largest = (65535, 16, 255)
    total = min(size // SECTOR, 65535 * 16 * 255)
    if total >= 65535 * 16 * 63:
        sectors, heads = 255, 16
        tracks = total // sectors
    else:
        sectors = 17
        tracks = total // sectors
        heads = max(4, -(-tracks // 1024))
        if tracks >= heads * 1024 or heads > 16:
            sectors, heads = 31, 16
            tracks = total // sectors
        if tracks >= heads * 1024:
            sectors, heads = 63, 16
            tracks = total // sectors
    found = (tracks // heads, heads, sectors)
    return found if found[0] * heads * sectors * SECTOR == size else largest


def _checksum(structure: bytes) -> int:
    """One's complement of the sum of all bytes, with the field itself zero."""
    return ~sum(structure) & 0xFFFFFFFF
