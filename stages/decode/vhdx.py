"""Read a VHDX image, dynamic and fixed, that was closed properly.

A log that waits to be replayed is refused (the disk's tables are only right with it), and so is a parent.

Source: Microsoft [MS-VHDX], "Header Section", "Region Table", "Metadata Region", "Block Allocation Table (BAT)".
"""

from __future__ import annotations

import struct
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass

from pipeline.flow.items import RangeReader
from pipeline.units import KiB, MiB, TiB
from stages.decode.image import Stretch
from stages.decode.mapped import MappedImage, Pages
from stages.decode.refusal import corrupt, unsupported

IDENTIFIER = b"vhdxfile"
HEADERS_AT = (64 * KiB, 128 * KiB)
HEADER = 4 * KiB
REGION_TABLES_AT = (192 * KiB, 256 * KiB)
REGION_TABLE = 64 * KiB
METADATA_TABLE = 64 * KiB
ENTRIES_MAX = 2047
SIZE_MAX = 64 * TiB
BLOCK_MIN, BLOCK_MAX = MiB, 256 * MiB
CHUNK_SECTORS = 1 << 23
BITMAP_BLOCK = MiB

BAT = uuid.UUID("2DC27766-F623-4200-9D64-115E9BFD4A08")
METADATA = uuid.UUID("8B7CA206-4790-4B9A-B8FE-575F050F886E")
FILE_PARAMETERS = uuid.UUID("CAA16737-FA36-4D43-B3B6-33F0AA44E76B")
DISK_SIZE = uuid.UUID("2FA54224-CD1B-4876-B211-5DBED83BF4B8")
DISK_ID = uuid.UUID("BECA12AB-B2E6-4523-93EF-C309E000C746")
LOGICAL_SECTOR = uuid.UUID("8141BF1D-A96F-4709-BA47-F233A8FAAB5F")
PHYSICAL_SECTOR = uuid.UUID("CDA348C7-445D-4471-9CC9-E9885251C556")
PARENT_LOCATOR = uuid.UUID("A8D35F2D-B30B-454D-ABF7-D3D84834AB0C")
_ITEMS = frozenset({FILE_PARAMETERS, DISK_SIZE, DISK_ID, LOGICAL_SECTOR, PHYSICAL_SECTOR, PARENT_LOCATOR})
_REQUIRED = 1 << 2
_KEEPS_BLOCKS, _HAS_PARENT = 1, 2

NOT_PRESENT, UNDEFINED, ZERO, UNMAPPED = range(4)
FULLY_PRESENT, PARTIALLY_PRESENT = 6, 7
STATE_MASK = 7
RESERVED_MASK = (1 << 20) - 1 ^ STATE_MASK


@dataclass(frozen=True, slots=True, kw_only=True)
class Region:
    """A region of the file, in image bytes."""

    offset: int
    length: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """What opening found and checked. Offsets are image bytes.

    Attributes:
        header_at: of the header that counts.
        damaged: what is wrong with the copies that do not count.
    """

    header_at: int
    sequence: int
    log: Region
    bat: Region
    metadata: Region
    size: int
    block_size: int
    keeps_blocks: bool
    logical_sector: int
    physical_sector: int
    disk_id: uuid.UUID
    creator: str
    damaged: tuple[str, ...]

    @property
    def chunk_ratio(self) -> int:
        """Payload blocks between two entries of sector bitmaps."""
        return CHUNK_SECTORS * self.logical_sector // self.block_size

    @property
    def blocks(self) -> int:
        """Payload blocks of the disk."""
        return -(-self.size // self.block_size)

    @property
    def entries(self) -> int:
        """Entries that the block table needs, with those of sector bitmaps."""
        return self.blocks + (self.blocks - 1) // self.chunk_ratio if self.blocks else 0


class VhdxImage(MappedImage):
    """An open VHDX without parent and log."""

    format = "vhdx"

    def __init__(self, reader: RangeReader, layout: Layout, *, strict: bool) -> None:
        super().__init__(reader, layout.size, layout.damaged)
        self.layout = layout
        self._strict = strict
        self._pages = Pages(reader, self.format)

    async def _stretches(self, offset: int, end: int) -> AsyncIterator[Stretch]:
        layout = self.layout
        size, ratio = layout.block_size, layout.chunk_ratio
        if offset >= end:
            return
        first, last = offset // size, (end - 1) // size
        found = self._pages.entries(
            layout.bat.offset, first + first // ratio, last + last // ratio + 1, code="<Q", empty=0
        )
        async for index, entry in found:
            chunk, place = divmod(index, ratio + 1)
            if place == ratio:
                continue  # the entry of a sector bitmap; only disks with a parent use it
            guest = (chunk * ratio + place) * size
            at = self._payload(entry, guest, layout.bat.offset + index * 8)
            if at is not None:
                start, stop = max(offset, guest), min(end, guest + size)
                yield Stretch(start, stop - start, at + start - guest, stop - start)

    def _payload(self, entry: int, guest: int, where: int) -> int | None:
        """Image offset of a block; None: it reads as zero."""
        state, at = entry & STATE_MASK, entry >> 20 << 20
        if entry & RESERVED_MASK:
            raise self._corrupt("reserved bits are set in the block table", where, guest)
        if state == PARTIALLY_PRESENT:
            raise self._corrupt("a block is partly in a parent, and there is none", where, guest)
        if state in (4, 5):
            raise self._corrupt(f"a block has the state {state}, which does not exist", where, guest)
        if self._strict and state not in (NOT_PRESENT, ZERO, FULLY_PRESENT):
            raise self._corrupt(f"a block has the state {state}, which no export writes", where, guest)
        if state != FULLY_PRESENT:
            return None
        # The end of the last block may be missing in the file, but no byte of the disk.
        if at < MiB or at + min(self.layout.block_size, self.size - guest) > self._reader.size:
            raise self._corrupt(f"a block lies outside of the image ({self._reader.size})", at, guest)
        return at


async def open_vhdx(reader: RangeReader, *, strict: bool = False) -> VhdxImage:
    """Read and check headers, region table and metadata.

    Args:
        strict: refuse what our own encoder never writes: damaged copies, unmapped blocks.
    Raises:
        FormatError: not a VHDX, damaged, hostile, with a log to replay or with a parent.
        StoreError: it can't be read.
    """
    layout = await read_layout(reader)
    if strict and layout.damaged:
        raise corrupt("vhdx", layout.damaged[0], HEADERS_AT[0])
    return VhdxImage(reader, layout, strict=strict)


async def read_layout(reader: RangeReader) -> Layout:
    """Headers, regions and metadata, checked. Raises as `open_vhdx`."""
    if reader.size < MiB:
        raise corrupt("vhdx", f"{reader.size} bytes are too few for a VHDX", 0)
    head = await reader.read(0, 520)
    if not head.startswith(IDENTIFIER):
        raise corrupt("vhdx", f"the image does not begin like a VHDX but with {head[:8].hex(' ')}", 0)
    damaged: list[str] = []
    header_at, header = await _newest_header(reader, damaged)
    (sequence,) = struct.unpack_from("<Q", header, 8)
    log_version, version, log_length, log_offset = struct.unpack_from("<HHIQ", header, 64)
    if version != 1:
        raise unsupported("vhdx", f"VHDX version {version}", header_at + 66)
    if any(header[48:64]):
        raise unsupported(
            "vhdx",
            "a log that must be replayed first (log replay needed)",
            header_at + 48,
            hint="Attach the disk once where it was made and close it cleanly; this program never writes to a source.",
        )
    if log_version:
        raise unsupported("vhdx", f"log version {log_version}", header_at + 64)
    log = _region(log_offset, log_length, reader.size, header_at + 68, "log")
    regions = await _regions(reader, damaged)
    return await _read_metadata(
        reader,
        regions,
        header_at=header_at,
        sequence=sequence,
        log=log,
        creator=head[8:].decode("utf-16-le", "replace").split("\0", 1)[0],
        damaged=damaged,
    )


async def _newest_header(reader: RangeReader, damaged: list[str]) -> tuple[int, bytes]:
    valid: list[tuple[int, int, bytes]] = []
    for number, at in enumerate(HEADERS_AT, 1):
        raw = await reader.read(at, HEADER)
        if raw[:4] == b"head" and _has_checksum(raw):
            valid.append((struct.unpack_from("<Q", raw, 8)[0], at, raw))
        else:
            damaged.append(f"header {number} of the image is damaged")
    if not valid:
        raise corrupt("vhdx", "both of its headers are damaged", HEADERS_AT[0])
    if len(valid) == 2 and valid[0][0] == valid[1][0] and valid[0][2] != valid[1][2]:
        raise corrupt("vhdx", "its headers differ and none is newer", HEADERS_AT[0])
    _, at, raw = max(valid, key=lambda one: one[0])
    return at, raw


async def _regions(reader: RangeReader, damaged: list[str]) -> dict[uuid.UUID, Region]:
    tables = [await reader.read(at, REGION_TABLE) for at in REGION_TABLES_AT]
    valid = [raw[:4] == b"regi" and _has_checksum(raw) for raw in tables]
    damaged += (f"region table {number} of the image is damaged" for number, good in enumerate(valid, 1) if not good)
    if not any(valid):
        raise corrupt("vhdx", "both of its region tables are damaged", REGION_TABLES_AT[0])
    if all(valid) and tables[0] != tables[1]:
        damaged.append("the region tables of the image differ")
    at, raw = next((at, raw) for at, raw, good in zip(REGION_TABLES_AT, tables, valid, strict=True) if good)
    (count,) = struct.unpack_from("<I", raw, 8)
    if count > ENTRIES_MAX:
        raise corrupt("vhdx", f"its region table has {count} entries, more than fit", at + 8)
    found: dict[uuid.UUID, Region] = {}
    for number in range(count):
        where = 16 + number * 32
        kind = uuid.UUID(bytes_le=raw[where : where + 16])
        offset, length, required = struct.unpack_from("<QII", raw, where + 16)
        if kind in found:
            raise corrupt("vhdx", f"its region table names the region {kind} twice", at + where)
        if kind not in (BAT, METADATA):
            if required & 1:
                raise unsupported("vhdx", f"an unknown region ({kind})", at + where)
            continue
        found[kind] = _region(offset, length, reader.size, at + where, "region")
    for kind, name in ((BAT, "block table"), (METADATA, "metadata")):
        if kind not in found:
            raise corrupt("vhdx", f"its region table does not name the {name}", at)
    bat, metadata = found[BAT], found[METADATA]
    if bat.offset < metadata.offset + metadata.length and metadata.offset < bat.offset + bat.length:
        raise corrupt("vhdx", "its regions overlap", at)
    return found


def _region(offset: int, length: int, image_size: int, where: int, name: str) -> Region:
    if offset % MiB or length % MiB or offset < MiB or not length or offset + length > image_size:
        raise corrupt("vhdx", f"a {name} of {length} bytes can't be at {offset}", where)
    return Region(offset=offset, length=length)


async def _read_metadata(
    reader: RangeReader,
    regions: dict[uuid.UUID, Region],
    *,
    header_at: int,
    sequence: int,
    log: Region,
    creator: str,
    damaged: list[str],
) -> Layout:
    region = regions[METADATA]
    table = await reader.read(region.offset, METADATA_TABLE)
    items = await _items(reader, region, table)
    block_size, flags = struct.unpack("<II", _item(items, FILE_PARAMETERS, 8, region))
    if flags & _HAS_PARENT or PARENT_LOCATOR in items:
        raise unsupported(
            "vhdx", "a parent image (differencing disk)", region.offset, hint="Merge it into its parent first."
        )
    (size,) = struct.unpack("<Q", _item(items, DISK_SIZE, 8, region))
    (logical,) = struct.unpack("<I", _item(items, LOGICAL_SECTOR, 4, region))
    (physical,) = struct.unpack("<I", _item(items, PHYSICAL_SECTOR, 4, region))
    if block_size.bit_count() != 1 or not BLOCK_MIN <= block_size <= BLOCK_MAX:
        raise corrupt("vhdx", f"blocks of {block_size} bytes are not possible", region.offset)
    if logical not in (512, 4096) or physical not in (512, 4096):
        raise corrupt("vhdx", f"sectors of {logical} and {physical} bytes are not possible", region.offset)
    if not 0 < size <= SIZE_MAX or size % logical:
        raise corrupt("vhdx", f"a disk of {size} bytes is not possible", region.offset)
    layout = Layout(
        header_at=header_at,
        sequence=sequence,
        log=log,
        bat=regions[BAT],
        metadata=region,
        size=size,
        block_size=block_size,
        keeps_blocks=bool(flags & _KEEPS_BLOCKS),
        logical_sector=logical,
        physical_sector=physical,
        disk_id=uuid.UUID(bytes_le=_item(items, DISK_ID, 16, region)),
        creator=creator,
        damaged=tuple(damaged),
    )
    if layout.entries * 8 > layout.bat.length:
        raise corrupt("vhdx", f"its block table is too small: {layout.entries} entries are needed", layout.bat.offset)
    return layout


async def _items(reader: RangeReader, region: Region, table: bytes) -> dict[uuid.UUID, bytes]:
    if table[:8] != b"metadata":
        raise corrupt("vhdx", "its metadata table does not begin like one", region.offset)
    (count,) = struct.unpack_from("<H", table, 10)
    if count > ENTRIES_MAX:
        raise corrupt("vhdx", f"its metadata table has {count} entries, more than fit", region.offset + 10)
    items: dict[uuid.UUID, bytes] = {}
    for number in range(count):
        where = 32 + number * 32
        kind = uuid.UUID(bytes_le=table[where : where + 16])
        offset, length, flags = struct.unpack_from("<III", table, where + 16)
        if kind in items:
            raise corrupt("vhdx", f"its metadata names the item {kind} twice", region.offset + where)
        if kind not in _ITEMS:
            if flags & _REQUIRED:
                raise unsupported("vhdx", f"an unknown metadata item ({kind})", region.offset + where)
            continue
        if offset < METADATA_TABLE or offset + length > region.length or length > MiB:
            raise corrupt("vhdx", f"a metadata item of {length} bytes can't be at {offset}", region.offset + where)
        wanted = 0 if kind == PARENT_LOCATOR else length
        items[kind] = await reader.read(region.offset + offset, min(wanted, 64))
    return items


def _item(items: dict[uuid.UUID, bytes], kind: uuid.UUID, length: int, region: Region) -> bytes:
    raw = items.get(kind)
    if raw is None or len(raw) != length:
        raise corrupt("vhdx", f"its metadata has no proper item {kind}", region.offset)
    return raw


def _has_checksum(raw: bytes) -> bool:
    """Whether the CRC-32C in bytes 4 to 8 is that of the rest, itself counted as zero."""
    import google_crc32c

    return bool(google_crc32c.value(raw[:4] + bytes(4) + raw[8:]) == struct.unpack_from("<I", raw, 4)[0])
