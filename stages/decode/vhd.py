"""Read a VHD image (Virtual PC, Hyper-V, Xen, Azure): fixed and dynamic.

Differencing disks are refused by name: without their parent they would read as zeros where the parent has data. The
sector bitmaps of a dynamic disk are not followed: where one says "never written", the block holds zeros, and readers
that trust a wrong bitmap lose data. Strict reading demands that they are all ones.

Source: Microsoft, Virtual Hard Disk Image Format Specification 1.0, "Hard Disk Footer Format", "Dynamic Disk Header
Format", "Block Allocation Table and Data Blocks".
"""

from __future__ import annotations

import struct
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass

from pipeline.flow.items import RangeReader
from pipeline.units import GiB, MiB, round_up
from stages.decode.image import Stretch
from stages.decode.mapped import FlatImage, MappedImage, Pages
from stages.decode.refusal import corrupt, unsupported

SECTOR = 512
FOOTER = 512
# Virtual PC before 2004 wrote a footer of 511 bytes.
OLD_FOOTER = 511
COOKIE = b"conectix"
HEADER_COOKIE = b"cxsparse"
HEADER = 1024
FIXED, DYNAMIC, DIFFERENCING = 2, 3, 4
# Sector numbers of blocks have 32 bits; what QEMU and Hyper-V take.
DYNAMIC_MAX = 2040 * GiB
# Hyper-V and QEMU write 2 MiB, Xen up to 16 MiB; the limit keeps sector bitmaps small.
BLOCK_MAX = 256 * MiB
ABSENT = 0xFFFFFFFF


@dataclass(frozen=True, slots=True, kw_only=True)
class Footer:
    """A footer with a valid checksum. Offsets are image bytes."""

    raw: bytes
    data_offset: int
    creator: str
    current_size: int
    cylinders: int
    heads: int
    sectors: int
    disk_type: int
    uuid: uuid.UUID
    has_saved_state: bool

    @property
    def geometry_size(self) -> int:
        """Bytes of the disk by its cylinders, heads and sectors."""
        return self.cylinders * self.heads * self.sectors * SECTOR


@dataclass(frozen=True, slots=True, kw_only=True)
class DynamicHeader:
    """A checked header of a dynamic disk. Offsets are image bytes."""

    at: int
    table_offset: int
    entries: int
    block_size: int

    @property
    def bitmap(self) -> int:
        """Bytes of a block's sector bitmap, in whole sectors."""
        return round_up(-(-self.block_size // SECTOR // 8), SECTOR)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """What opening found: the footer that counts, and the header of a dynamic disk.

    Attributes:
        footer_at: image offset of the footer at the end; where it should be when it is damaged.
        copy: the footer at offset 0, where it is valid (dynamic disks).
        tail: the footer at the end, where it is valid.
    """

    footer: Footer
    header: DynamicHeader | None
    footer_at: int
    copy: Footer | None
    tail: Footer | None
    warnings: tuple[str, ...]


class FixedVhd(FlatImage):
    """A fixed VHD: the disk, then the footer."""

    format = "vhd"


class DynamicVhd(MappedImage):
    """A dynamic VHD: blocks that are absent, or stored behind their sector bitmap."""

    format = "vhd"

    def __init__(self, reader: RangeReader, layout: Layout, header: DynamicHeader, *, strict: bool) -> None:
        super().__init__(reader, layout.footer.current_size, layout.warnings)
        self._header = header
        self._pages = Pages(reader, self.format)
        self._strict = strict

    async def _stretches(self, offset: int, end: int) -> AsyncIterator[Stretch]:
        header = self._header
        size = header.block_size
        if offset >= end:
            return
        blocks = self._pages.entries(header.table_offset, offset // size, -(-end // size), code=">I", empty=0xFF)
        async for block, sector in blocks:
            guest = block * size
            at = sector * SECTOR
            data = at + header.bitmap
            if at < FOOTER:
                raise self._corrupt("a block lies inside the header", at, guest)
            # A writer may leave the last block short behind the end of the disk; a byte of the disk may not be missing.
            if data + min(size, self.size - guest) > self._reader.size:
                raise self._corrupt(f"a block lies behind the end of the image ({self._reader.size})", at, guest)
            start, stop = max(offset, guest), min(end, guest + size)
            if self._strict and start == guest:
                yield Stretch(start, stop - start, at, header.bitmap + stop - start, packed_from=guest)
            else:
                yield Stretch(start, stop - start, data + start - guest, stop - start)

    def unpack(self, stretch: Stretch, stored: memoryview) -> bytes:
        """The front of a block behind its bitmap, which must say that every sector was written."""
        bitmap = self._header.bitmap
        used = -(-min(self._header.block_size, self.size - stretch.offset) // SECTOR)
        if not marks_all(stored[:bitmap], used):
            raise self._corrupt("the bitmap of a block calls some of its sectors unused", stretch.at, stretch.offset)
        return bytes(stored[bitmap:])


async def open_vhd(reader: RangeReader, *, strict: bool = False) -> FixedVhd | DynamicVhd:
    """Read and check footers and header.

    Args:
        strict: refuse what our own encoder never writes: two footers that differ, sectors marked as unused.
    Raises:
        FormatError: not a VHD, damaged, hostile, or a differencing disk.
        StoreError: it can't be read.
    """
    layout = await read_layout(reader)
    if strict and layout.warnings:
        raise corrupt("vhd", layout.warnings[0], layout.footer_at)
    if layout.header is None:
        return FixedVhd(reader, layout.footer.current_size, layout.warnings)
    return DynamicVhd(reader, layout, layout.header, strict=strict)


async def read_layout(reader: RangeReader) -> Layout:
    """Footers and header, checked. Raises as `open_vhd`."""
    if reader.size < OLD_FOOTER:
        raise corrupt("vhd", f"{reader.size} bytes are too few for a VHD footer", 0)
    start = await reader.read(0, min(FOOTER, reader.size))
    end = await reader.read(max(0, reader.size - FOOTER), min(FOOTER, reader.size))
    tail_at = reader.size - (FOOTER if end.startswith(COOKIE) or reader.size < FOOTER else OLD_FOOTER)
    tail_raw = end[len(end) - (reader.size - tail_at) :]
    copy = _parse_footer(start) if start.startswith(COOKIE) and reader.size > FOOTER else None
    tail = _parse_footer(tail_raw) if tail_raw.startswith(COOKIE) else None
    # The guest of a fixed disk chooses what its first sector looks like: there the end decides.
    footer = tail if tail is not None and tail.disk_type == FIXED else copy or tail
    if footer is None:
        if COOKIE in (start[:8], tail_raw[:8]):
            raise corrupt("vhd", "the checksum of its footer is wrong", tail_at)
        raise corrupt("vhd", "the image has no VHD footer, neither at its end nor at its begin", tail_at)
    if DIFFERENCING in (footer.disk_type, tail.disk_type if tail else None):
        raise unsupported(
            "vhd",
            "a parent image (differencing disk)",
            60,
            hint="Merge it into its parent first, with the tool that made it.",
        )
    if footer.disk_type not in (FIXED, DYNAMIC):
        raise unsupported("vhd", f"disk type {footer.disk_type}", 60)
    if footer.disk_type == FIXED and tail is None:
        raise corrupt("vhd", "a fixed disk has no footer at its end: it is cut short", tail_at)
    if footer.current_size % SECTOR or footer.current_size >= 1 << 63:
        raise corrupt("vhd", f"a disk of {footer.current_size} bytes is not possible", 48)
    if footer.disk_type == FIXED:
        return _fixed_layout(footer, tail_at)
    header = await _read_header(reader, footer)
    return Layout(
        footer=footer,
        header=header,
        footer_at=tail_at,
        copy=copy,
        tail=tail,
        warnings=tuple(_warnings(footer, copy, tail)),
    )


def _fixed_layout(footer: Footer, footer_at: int) -> Layout:
    if footer.current_size != footer_at:
        raise corrupt(
            "vhd",
            f"the footer tells of a disk of {footer.current_size} bytes, {footer_at} lie in front of it",
            footer_at + 48,
        )
    return Layout(
        footer=footer,
        header=None,
        footer_at=footer_at,
        copy=None,
        tail=footer,
        warnings=tuple(_warnings(footer, footer, footer)),
    )


def _warnings(footer: Footer, copy: Footer | None, tail: Footer | None) -> list[str]:
    told = []
    if copy is None or tail is None:
        told.append(f"the footer at the {'begin' if copy is None else 'end'} of the image is damaged or missing")
    elif copy.raw != tail.raw:
        told.append("the footers at begin and end of the image differ")
    if footer.has_saved_state:
        told.append("the guest was suspended: its disk is not at rest")
    # Where Virtual PC made the image, its guest saw no more than the geometry tells.
    if footer.creator in ("vpc ", "qemu") and footer.geometry_size < min(
        footer.current_size, 65535 * 16 * 255 * SECTOR
    ):
        told.append(
            f"by its geometry the disk has {footer.geometry_size} bytes; all of its {footer.current_size} are read"
        )
    return told


async def _read_header(reader: RangeReader, footer: Footer) -> DynamicHeader:
    at = footer.data_offset
    if at % SECTOR or not FOOTER <= at <= reader.size - HEADER:
        raise corrupt("vhd", f"the header of a dynamic disk can't be at {at}", 16)
    raw = await reader.read(at, HEADER)
    if not raw.startswith(HEADER_COOKIE):
        raise corrupt("vhd", "its dynamic header does not begin with cxsparse", at)
    if struct.unpack_from(">I", raw, 36)[0] != checksum(raw, 36):
        raise corrupt("vhd", "the checksum of its dynamic header is wrong", at + 36)
    table_offset, version, entries, block_size = struct.unpack_from(">QIII", raw, 16)
    if version != 0x00010000:
        raise unsupported("vhd", f"a dynamic header of version {version:#x}", at + 24)
    if block_size.bit_count() != 1 or not SECTOR <= block_size <= BLOCK_MAX:
        raise corrupt("vhd", f"blocks of {block_size} bytes are not possible", at + 32)
    if entries * block_size < footer.current_size:
        raise corrupt("vhd", f"its block table has {entries} entries, too few for the disk", at + 28)
    if footer.current_size > DYNAMIC_MAX:
        raise corrupt("vhd", f"a dynamic disk of {footer.current_size} bytes is not possible ({DYNAMIC_MAX})", 48)
    if table_offset % SECTOR or table_offset < FOOTER or table_offset + entries * 4 > reader.size:
        raise corrupt("vhd", f"its block table can't be at {table_offset}", at + 16)
    return DynamicHeader(at=at, table_offset=table_offset, entries=entries, block_size=block_size)


def _parse_footer(raw: bytes) -> Footer | None:
    """The footer; None where its checksum is wrong. `raw` has 511 or 512 bytes."""
    raw = raw.ljust(FOOTER, b"\0")
    if struct.unpack_from(">I", raw, 64)[0] != checksum(raw, 64):
        return None
    (data_offset,) = struct.unpack_from(">Q", raw, 16)
    current_size, cylinders, heads, sectors, disk_type = struct.unpack_from(">QHBBI", raw, 48)
    return Footer(
        raw=raw,
        data_offset=data_offset,
        creator=raw[28:32].decode("latin-1"),
        current_size=current_size,
        cylinders=cylinders,
        heads=heads,
        sectors=sectors,
        disk_type=disk_type,
        uuid=uuid.UUID(bytes=raw[68:84]),
        has_saved_state=bool(raw[84]),
    )


def checksum(raw: bytes, field: int) -> int:
    """The checksum of a footer or header, whose own field at `field` counts as zero."""
    return ~(sum(raw) - sum(raw[field : field + 4])) & 0xFFFFFFFF


def marks_all(bitmap: bytes | memoryview, sectors: int) -> bool:
    """Whether the first `sectors` bits are ones, the highest bit of a byte first."""
    whole, rest = divmod(sectors, 8)
    mask = 0xFF00 >> rest & 0xFF
    return bytes(bitmap[:whole]).count(0xFF) == whole and (not rest or bitmap[whole] & mask == mask)
