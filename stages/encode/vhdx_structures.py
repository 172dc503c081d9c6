"""The structures of a VHDX: headers, region table, metadata, block allocation table.

Source: MS-VHDX, "File Type Identifier", "Headers", "Region Table", "Metadata Region", "BAT Structure".
"""

from __future__ import annotations

import struct
import uuid
from collections.abc import Iterator

from pipeline.units import KiB, MiB, round_up
from stages.encode.allocation import StoredUnits
from stages.encode.birth import Birth

SECTOR = 512
PHYSICAL_SECTOR = 4096
LOG_OFFSET = 1 * MiB
LOG_LENGTH = 1 * MiB
METADATA_OFFSET = 2 * MiB
METADATA_LENGTH = 1 * MiB
TABLE_OFFSET = 3 * MiB
ALIGNMENT = 1 * MiB  # of every region and every block

# What a block reads as where it is not stored. "Not present" would do for most readers, but says that the bytes are
# undefined; the offset has to be 0 then, or Hyper-V refuses the image.
BLOCK_ZERO = 2
BLOCK_PRESENT = 6

_FILE_PARAMETERS = uuid.UUID("CAA16737-FA36-4D43-B3B6-33F0AA44E76B")
_VIRTUAL_DISK_SIZE = uuid.UUID("2FA54224-CD1B-4876-B211-5DBED83BF4B8")
_VIRTUAL_DISK_ID = uuid.UUID("BECA12AB-B2E6-4523-93EF-C309E000C746")
_LOGICAL_SECTOR = uuid.UUID("8141BF1D-A96F-4709-BA47-F233A8FAAB5F")
_PHYSICAL_SECTOR = uuid.UUID("CDA348C7-445D-4471-9CC9-E9885251C556")
_TABLE_REGION = uuid.UUID("2DC27766-F623-4200-9D64-115E9BFD4A08")
_METADATA_REGION = uuid.UUID("8B7CA206-4790-4B9A-B8FE-575F050F886E")

_IS_VIRTUAL_DISK = 2
_IS_REQUIRED = 4
_ITEMS_OFFSET = 64 * KiB

# signature, checksum, sequence number, identifiers (file write, data write, log), versions (log, format), log (length,
# offset)
_HEADER = struct.Struct("<4sIQ16s16s16sHHIQ4016x")
_REGION = struct.Struct("<16sQII")
_ITEM = struct.Struct("<16sIII4x")


def front(table_bytes: int, birth: Birth) -> Iterator[bytes | int]:
    """Everything from image offset 0 to the log: file identifier, both headers, both region tables."""
    creator = "pipeline".encode("utf-16-le")
    yield (b"vhdxfile" + creator).ljust(64 * KiB, b"\0")
    for sequence in (1, 2):
        yield _header(sequence, birth).ljust(64 * KiB, b"\0")
    regions = _region_table(table_bytes)
    yield regions
    yield regions
    yield LOG_OFFSET - 5 * 64 * KiB


def metadata(size: int, block: int, birth: Birth) -> bytes:
    """The metadata region up to the end of its last item."""
    items = (
        (_FILE_PARAMETERS, _IS_REQUIRED, struct.pack("<II", block, 0)),
        (_VIRTUAL_DISK_SIZE, _IS_REQUIRED | _IS_VIRTUAL_DISK, struct.pack("<Q", size)),
        (_VIRTUAL_DISK_ID, _IS_REQUIRED | _IS_VIRTUAL_DISK, birth.uuid("vhdx disk").bytes_le),
        (_LOGICAL_SECTOR, _IS_REQUIRED | _IS_VIRTUAL_DISK, struct.pack("<I", SECTOR)),
        (_PHYSICAL_SECTOR, _IS_REQUIRED | _IS_VIRTUAL_DISK, struct.pack("<I", PHYSICAL_SECTOR)),
    )
    table = struct.pack("<8sHH20x", b"metadata", 0, len(items))
    values = b""
    for kind, flags, value in items:
        table += _ITEM.pack(kind.bytes_le, _ITEMS_OFFSET + len(values), len(value), flags)
        values += value
    return table.ljust(_ITEMS_OFFSET, b"\0") + values


def chunk_ratio(block: int) -> int:
    """How many blocks share one entry for a sector bitmap, which follows theirs."""
    return 2**23 * SECTOR // block


def table_entries(blocks: int, block: int) -> int:
    """Entries of the block allocation table; those for sector bitmaps are part of it and stay empty."""
    return blocks + (blocks - 1) // chunk_ratio(block)


def table_length(blocks: int, block: int) -> int:
    """Bytes of the region of the block allocation table."""
    return round_up(8 * table_entries(blocks, block), ALIGNMENT)


def table(stored: StoredUnits, first: int, block: int) -> Iterator[bytes]:
    """The block allocation table.

    Args:
        first: image offset of the first block.
    """
    import numpy

    ratio = chunk_ratio(block)
    number = 0
    for flags, ranks in stored.stretches():
        # Blocks lie at whole MiB, and an entry counts these from bit 20 on: that is the offset itself.
        entries = numpy.where(flags, (first + ranks * block) | BLOCK_PRESENT, BLOCK_ZERO).astype("<u8")
        following = max(ratio, round_up(number, ratio))  # the first block here that a bitmap's entry precedes
        bitmaps = numpy.arange(following, number + len(entries), ratio) - number
        number += len(entries)
        yield numpy.insert(entries, bitmaps, 0).tobytes()


def _header(sequence: int, birth: Birth) -> bytes:
    def pack(checksum: int) -> bytes:
        return _HEADER.pack(
            b"head",
            checksum,
            sequence,
            birth.uuid("vhdx file write").bytes_le,
            birth.uuid("vhdx data write").bytes_le,
            bytes(16),  # no log to replay
            0,
            1,
            LOG_LENGTH,
            LOG_OFFSET,
        )

    return pack(_checksum(pack(0)))


def _region_table(table_bytes: int) -> bytes:
    entries = _REGION.pack(_TABLE_REGION.bytes_le, TABLE_OFFSET, table_bytes, 1)
    entries += _REGION.pack(_METADATA_REGION.bytes_le, METADATA_OFFSET, METADATA_LENGTH, 1)

    def pack(checksum: int) -> bytes:
        return (struct.pack("<4sII4x", b"regi", checksum, 2) + entries).ljust(64 * KiB, b"\0")

    return pack(_checksum(pack(0)))


def _checksum(structure: bytes) -> int:
    import google_crc32c

    value: int = google_crc32c.value(structure)
    return value
