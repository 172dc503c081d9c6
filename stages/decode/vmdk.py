"""Read a VMDK image: streamOptimized, monolithicSparse, and descriptors whose extents the caller hands over.

An image of one file is read only when its descriptor names one sparse extent and no other: a descriptor that leads to
other files is refused, unless the caller names each of them. Names inside are compared, never opened.

Source: VMware, Virtual Disk Format 5.0, "Hosted Sparse Extents", "Grain Directory and Grain Tables", "Stream-Optimized
Compressed Sparse Extents"; QEMU block/vmdk.c for the zeroed grain.
"""

from __future__ import annotations

import struct
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

from pipeline.flow.items import RangeReader
from pipeline.units import KiB, MiB
from stages.decode.compressed import Unpackable
from stages.decode.image import Extent, Fetched, Stretch, fill, tile
from stages.decode.mapped import PAGE, FlatImage, MappedImage, Pages
from stages.decode.places import Place
from stages.decode.refusal import corrupt, misnamed, unsupported
from stages.decode.vmdk_descriptor import (
    DESCRIPTOR_MAX,
    FIRST_LINE,
    FLAT_KINDS,
    Descriptor,
    ExtentLine,
    parse_descriptor,
)

SECTOR = 512
MAGIC = b"KDMV"
COWD_MAGIC = b"COWD"
SESPARSE_MAGIC = 0xCAFEBABE
HEADER = 512
NEWLINE_TEST, SECOND_DIRECTORY, ZEROED_GRAINS, COMPRESSED, MARKERS = 1 << 0, 1 << 1, 1 << 2, 1 << 16, 1 << 17
KNOWN_FLAGS = NEWLINE_TEST | SECOND_DIRECTORY | ZEROED_GRAINS | COMPRESSED | MARKERS
AT_END = (1 << 64) - 1
LINE_ENDS = b"\n \r\n"
DEFLATE = 1
TABLE_ENTRIES = 512
TABLE = TABLE_ENTRIES * 4
GRAIN_MIN, GRAIN_MAX = 4 * KiB, 2 * MiB
GRAIN_MARKER = 12
END_MARKER, TABLE_MARKER, DIRECTORY_MARKER, FOOTER_MARKER = range(4)
# Footer marker, footer and end of stream.
STREAM_TAIL = 3 * SECTOR
# VMware reads a packed grain of 64 KiB into a buffer of this size, its marker included.
PACKED_MAX = 66048
ZEROED = 1

_ONE_FILE = frozenset({"monolithicSparse", "streamOptimized"})

Extents = Mapping[str, RangeReader] | Sequence[RangeReader]


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseHeader:
    """The header of a sparse extent, checked. Sizes and offsets are bytes of the file.

    Attributes:
        at: where this header lies (0, or that of the footer).
        directory: of grain tables; None in a header that leaves it to the footer.
        second: the redundant directory, 0 where there is none.
    """

    at: int
    raw: bytes
    version: int
    flags: int
    capacity: int
    grain: int
    descriptor: int
    descriptor_bytes: int
    second: int
    directory: int | None
    overhead: int
    is_unclean: bool

    @property
    def grains(self) -> int:
        """How many grains the disk has."""
        return -(-self.capacity // self.grain)

    @property
    def tables(self) -> int:
        """How many grain tables the directory names."""
        return -(-self.grains // TABLE_ENTRIES)

    @property
    def is_compressed(self) -> bool:
        """Grains are packed."""
        return bool(self.flags & COMPRESSED)

    @property
    def has_markers(self) -> bool:
        """Packed grains begin with their place and length."""
        return bool(self.flags & MARKERS)


class SparseExtent(MappedImage):
    """One sparse file: a directory of grain tables; grains are stored as they are, or packed one by one."""

    format = "vmdk"

    def __init__(self, reader: RangeReader, header: SparseHeader, *, size: int, strict: bool) -> None:
        warnings = ("the image was not closed properly; its tables may be old",) if header.is_unclean else ()
        super().__init__(reader, size, warnings)
        self.header = header
        self._strict = strict
        # Between the grains of a stream each table stands alone: a page would be mostly grains.
        self._pages = Pages(reader, self.format, page=0 if header.is_compressed else PAGE)
        self._directory = Pages(reader, self.format)

    @property
    def reader(self) -> RangeReader:
        """The file it lies in."""
        return self._reader

    async def table(self, at: int) -> bytes:
        """The grain table at an image offset."""
        return await self._pages.read(at, TABLE)

    async def tables(self, first: int, last: int) -> AsyncIterator[tuple[int, int]]:
        """(index, image offset) of the grain tables in [first, last) that exist, checked against the file's size."""
        header = self.header
        found = self._directory.entries(header.directory or 0, first, last, code="<I", empty=0)
        async for index, sector in found:
            at = sector * SECTOR
            if at < HEADER or at + TABLE > self._reader.size:
                raise self._corrupt(f"its directory points to {at}, where no grain table can be", header.directory)
            yield index, at

    async def _stretches(self, offset: int, end: int) -> AsyncIterator[Stretch]:
        header = self.header
        span = header.grain * TABLE_ENTRIES
        if offset >= end:
            return
        room = self._reader.size
        async for index, at in self.tables(offset // span, -(-end // span)):
            # Tables that all entries share would make a small file a long work.
            room -= TABLE
            if room < 0:
                raise self._corrupt("its directory names more grain tables than the file holds", at)
            table = struct.unpack(f"<{TABLE_ENTRIES}I", await self.table(at))
            base = index * span
            first = max(0, offset - base) // header.grain
            last = -(-min(end - base, span) // header.grain)
            for number in range(first, last):
                if table[number]:
                    one = self._stretch(table, number, base + number * header.grain, offset, end)
                    if one is not None:
                        yield one

    def _stretch(self, table: tuple[int, ...], number: int, guest: int, offset: int, end: int) -> Stretch | None:
        header = self.header
        start, stop = max(guest, offset), min(guest + header.grain, end)
        if table[number] == ZEROED and header.flags & ZEROED_GRAINS:
            return None
        at = table[number] * SECTOR
        if header.is_compressed:
            if not HEADER <= at < self._reader.size:
                raise self._corrupt(f"a grain lies outside of the image ({self._reader.size})", at, guest)
            return Stretch(start, stop - start, at, self._packed_bytes(table, number), packed_from=guest)
        # The end of a grain behind the end of the disk may be missing.
        if at < HEADER or at + min(header.grain, self.size - guest) > self._reader.size:
            raise self._corrupt(f"a grain lies outside of the image ({self._reader.size})", at, guest)
        return Stretch(start, stop - start, at + start - guest, stop - start)

    def _packed_bytes(self, table: tuple[int, ...], number: int) -> int:
        """How many bytes a packed grain may have: up to the next one behind it, and never beyond any sane bound."""
        at = table[number]
        bound = packed_max(self.header.grain, strict=self._strict)
        following = next((one for one in table[number + 1 :] if one > ZEROED), 0)
        if following > at:
            bound = min(bound, (following - at) * SECTOR)
        return min(bound, self._reader.size - at * SECTOR)

    def unpack(self, stretch: Stretch, stored: memoryview) -> bytes:
        """Unpack one grain."""
        guest = stretch.packed_from or 0
        wanted = self.header.grain if self._strict else min(self.header.grain, self.size - guest)
        if self.header.has_markers:
            if stored.nbytes < GRAIN_MARKER:
                raise self._corrupt("the image ends inside the marker of a grain", stretch.at, guest)
            sector, length = struct.unpack_from("<QI", stored)
            if sector * SECTOR != guest:
                raise self._corrupt(f"a grain says it belongs to sector {sector}", stretch.at, guest)
            if not length or GRAIN_MARKER + length > stored.nbytes:
                raise self._corrupt(f"a grain of {length} packed bytes does not fit where it lies", stretch.at, guest)
            stored = stored[GRAIN_MARKER : GRAIN_MARKER + length]
        try:
            return _inflate(stored, self.header.grain, at_least=wanted)
        except Unpackable as error:
            raise self._corrupt(f"a grain can't be unpacked: {error}", stretch.at, guest) from None


class VmdkImage(SparseExtent):
    """An image of one file, with its descriptor inside."""

    def __init__(self, reader: RangeReader, header: SparseHeader, descriptor: Descriptor, *, strict: bool) -> None:
        super().__init__(reader, header, size=header.capacity, strict=strict)
        self.descriptor = descriptor


class FlatExtent(FlatImage):
    """A part of the disk stored as it is."""

    format = "vmdk"


class JoinedVmdk:
    """A disk of several files: each part answers for its own guest range. Ranges without a part read as zero."""

    format = "vmdk"

    def __init__(self, descriptor: Descriptor, parts: Sequence[tuple[int, MappedImage]]) -> None:
        self.descriptor = descriptor
        self.parts = tuple(parts)
        self.size = descriptor.size
        self.warnings = tuple(warning for _, part in self.parts for warning in part.warnings)

    def extents(self, offset: int, length: int) -> AsyncIterator[Extent]:
        """Tile the range; a stretch ends at the latest where its file does."""
        self._check_range(offset, length)
        return tile(self._stored(offset, offset + length), offset, offset + length)

    async def fetch(self, offset: int, length: int) -> Fetched:
        """Read the stored bytes of the range, file after file."""
        self._check_range(offset, length)
        found: list[tuple[Stretch, memoryview]] = []
        for base, part, start, stop in self._within(offset, offset + length):
            one = await part.fetch(start - base, stop - start)
            found += ((_shifted(stretch, base), stored) for stretch, stored in one.parts)
        return Fetched(offset, length, tuple(found))

    def decode(self, fetched: Fetched, into: memoryview) -> None:
        """Unpack what is packed, each by its own part. Threads: any."""
        for stretch, stored, target in fill(fetched, into):
            base, part, *_ = next(self._within(stretch.offset, stretch.offset + 1))
            skip = stretch.offset - (stretch.packed_from or 0)
            target[:] = part.unpack(_shifted(stretch, -base), stored)[skip : skip + stretch.length]

    async def read(self, offset: int, length: int) -> bytes:
        """`length` guest bytes, decoded on the spot."""
        made = bytearray(length)
        self.decode(await self.fetch(offset, length), memoryview(made))
        return bytes(made)

    async def places(self, offset: int, length: int) -> AsyncIterator[Place]:
        """What each file says about its part; `at` is an offset in that file."""
        self._check_range(offset, length)
        for base, part, start, stop in self._within(offset, offset + length):
            async for place in part.places(start - base, stop - start):
                yield replace(place, offset=base + place.offset)

    def _check_range(self, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > self.size:
            raise ValueError(f"[{offset}, {offset + length}) is not inside a disk of {self.size} bytes")

    def _within(self, offset: int, end: int) -> Iterator[tuple[int, MappedImage, int, int]]:
        """(guest offset of the part, part, first and last guest byte of it that is wanted)."""
        for base, part in self.parts:
            start, stop = max(offset, base), min(end, base + part.size)
            if start < stop:
                yield base, part, start, stop

    async def _stored(self, offset: int, end: int) -> AsyncIterator[range]:
        for base, part, start, stop in self._within(offset, end):
            async for extent in part.extents(start - base, stop - start):
                if not extent.is_zero:
                    yield range(base + extent.offset, base + extent.end)


def _shifted(stretch: Stretch, by: int) -> Stretch:
    packed_from = None if stretch.packed_from is None else stretch.packed_from + by
    return replace(stretch, offset=stretch.offset + by, packed_from=packed_from)


def packed_max(grain: int, *, strict: bool) -> int:
    """The most bytes a packed grain may take with its marker. Other writers get twice the grain, as in QEMU."""
    return -(-PACKED_MAX * grain // (64 * KiB)) if strict else GRAIN_MARKER + 2 * grain


def _inflate(packed: memoryview, size: int, *, at_least: int) -> bytes:
    """Unpack a zlib stream with its checksum; never makes more than `size + 1` bytes."""
    from isal import isal_zlib

    damage = cast("type[Exception]", isal_zlib.error)  # its stub says that this is an instance
    stream = isal_zlib.decompressobj(wbits=15)
    try:
        data: bytes = stream.decompress(packed, size + 1)
    except damage as error:
        raise Unpackable(f"its zlib stream is damaged: {error}") from None
    if len(data) > size:
        raise Unpackable(f"it unpacks to more than {size} bytes")
    if len(data) < at_least or not stream.eof:
        raise Unpackable(f"its zlib stream ends early, after {len(data)} of {at_least} bytes")
    return data


async def open_vmdk(
    reader: RangeReader, *, strict: bool = False, extents: Extents | None = None
) -> VmdkImage | JoinedVmdk:
    """Read and check header and descriptor.

    Args:
        extents: the files of a disk that has several: in the order of the descriptor (extents of zeros have none), or
            by the names that the descriptor has for them. Borrowed.
        strict: refuse what our own encoder never writes: a footer unlike the header, an unclean shutdown, a version
            that is not the subformat's, packed grains larger than VMware's buffer, grains shorter than they should be.
    Raises:
        FormatError: not a VMDK, damaged, hostile, or a disk of other files than the caller named.
        StoreError: it can't be read.
    """
    start = await reader.read(0, min(HEADER, reader.size))
    if start.startswith(MAGIC):
        if extents:
            raise misnamed("vmdk", "extents were named for an image that holds its disk itself", hint="Leave them out.")
        return await _open_one_file(reader, strict=strict)
    _refuse_relatives(start)
    if not start.lstrip()[: len(FIRST_LINE)].lower() == FIRST_LINE.lower():
        raise corrupt("vmdk", f"the image does not begin like a VMDK but with {start[:4].hex(' ')}", 0)
    if reader.size > DESCRIPTOR_MAX:
        raise corrupt(
            "vmdk", f"a descriptor of {reader.size} bytes is larger than any disk needs ({DESCRIPTOR_MAX})", 0
        )
    descriptor = parse_descriptor(await reader.read(0, reader.size), 0)
    if extents is None or not len(extents):
        names = ", ".join(repr(one.name) for one in descriptor.extents[:8] if one.kind != "ZERO")
        raise unsupported(
            "vmdk",
            "other files (extents)",
            0,
            hint=f"Name each one yourself (extents = [...], --extent FILE). The descriptor calls them {names}.",
        )
    return await _join(descriptor, extents, strict=strict)


async def _open_one_file(reader: RangeReader, *, strict: bool) -> VmdkImage:
    header = await read_header(reader, strict=strict)
    descriptor = await read_descriptor(reader, header)
    if descriptor is None:
        raise unsupported(
            "vmdk",
            "a descriptor in another file",
            28,
            hint="Open the descriptor, and name this file as one of its extents.",
        )
    if descriptor.create_type not in _ONE_FILE:
        raise unsupported("vmdk", f"the subformat {descriptor.create_type[:40]!r} inside one file", header.descriptor)
    if len(descriptor.extents) != 1 or descriptor.extents[0].kind != "SPARSE":
        raise corrupt("vmdk", "the descriptor leads to other files than the image itself", header.descriptor)
    if descriptor.size != header.capacity:
        raise corrupt(
            "vmdk", f"descriptor ({descriptor.size} bytes) and header ({header.capacity}) contradict each other", 12
        )
    if strict:
        _be_strict(header, descriptor)
    return VmdkImage(reader, header, descriptor, strict=strict)


def _be_strict(header: SparseHeader, descriptor: Descriptor) -> None:
    is_stream = descriptor.create_type == "streamOptimized"
    if header.is_unclean:
        raise corrupt("vmdk", "the image was not closed properly", 72)
    if (
        header.version != (3 if is_stream else 1)
        or header.is_compressed != is_stream
        or header.has_markers != is_stream
    ):
        raise corrupt("vmdk", "version and flags are not those of its subformat", 4)
    if descriptor.unknown_lines:
        raise corrupt("vmdk", "its descriptor has lines that importers refuse", header.descriptor)


async def read_header(reader: RangeReader, *, strict: bool = False) -> SparseHeader:
    """The header that counts: the one at the begin, or the footer that it points to. Raises as `open_vmdk`."""
    if reader.size < HEADER:
        raise corrupt("vmdk", f"{reader.size} bytes are too few for a VMDK header", 0)
    first = parse_header(await reader.read(0, HEADER), 0)
    if first.directory is not None:
        if not first.capacity:
            raise corrupt("vmdk", "a disk of 0 bytes is not possible", 12)
        _check_tables(first, reader.size)
        return first
    at = reader.size - 2 * SECTOR
    if reader.size < HEADER + STREAM_TAIL:
        raise corrupt("vmdk", "the image ends early: it has no footer", reader.size)
    tail = await reader.read(reader.size - STREAM_TAIL, STREAM_TAIL)
    size, is_grain, kind = struct.unpack_from("<QII", tail)
    if (size, is_grain, kind) != (1, 0, FOOTER_MARKER) or tail[SECTOR : SECTOR + 4] != MAGIC:
        raise corrupt("vmdk", "the image ends early: no footer is where it should be", at)
    if any(tail[2 * SECTOR : 2 * SECTOR + 16]):
        raise corrupt("vmdk", "the image does not end with the end of its stream", at + SECTOR)
    footer = parse_header(tail[SECTOR : 2 * SECTOR], at)
    if footer.directory is None:
        raise corrupt("vmdk", "its footer does not say where the grain directory is", at + 56)
    if not _agree(first, footer, strict=strict):
        raise corrupt("vmdk", "header and footer contradict each other", at)
    _check_tables(footer, reader.size)
    return footer


def _agree(header: SparseHeader, footer: SparseHeader, *, strict: bool) -> bool:
    """Whether both tell of the same disk. Some writers know its capacity only at the end."""
    same = (header.version, header.flags, header.grain, header.descriptor, header.descriptor_bytes)
    if same != (footer.version, footer.flags, footer.grain, footer.descriptor, footer.descriptor_bytes):
        return False
    return header.capacity == footer.capacity or (not header.capacity and not strict)


def parse_header(raw: bytes, at: int) -> SparseHeader:
    """Parse and check a header or footer on its own."""
    if raw[:4] != MAGIC:
        raise corrupt("vmdk", f"the image does not begin like a VMDK but with {raw[:4].hex(' ')}", at)
    version, flags, capacity, grain, descriptor, descriptor_size, entries, second, directory, overhead = (
        struct.unpack_from("<IIQQQQIQQQ", raw, 4)
    )
    if version not in (1, 2, 3):
        raise unsupported("vmdk", f"VMDK version {version}", at + 4)
    if unknown := flags & ~KNOWN_FLAGS:
        raise unsupported("vmdk", f"unknown flags ({unknown:#x})", at + 8)
    if flags & NEWLINE_TEST and raw[73:77] != LINE_ENDS:
        raise corrupt("vmdk", "its line ends were changed: it was copied as text", at + 73)
    if flags & MARKERS and not flags & COMPRESSED:
        raise unsupported("vmdk", "markers around grains that are not compressed", at + 8)
    (algorithm,) = struct.unpack_from("<H", raw, 77)
    if flags & COMPRESSED and algorithm != DEFLATE:
        raise unsupported("vmdk", f"compression algorithm {algorithm}", at + 77)
    if grain.bit_count() != 1 or not GRAIN_MIN <= grain * SECTOR <= GRAIN_MAX:
        raise corrupt("vmdk", f"grains of {grain} sectors are not possible", at + 20)
    if entries != TABLE_ENTRIES:
        raise corrupt("vmdk", f"grain tables of {entries} entries are not possible", at + 44)
    if capacity * SECTOR >= 1 << 63:
        raise corrupt("vmdk", f"a disk of {capacity} sectors is not possible", at + 12)
    return SparseHeader(
        at=at,
        raw=raw,
        version=version,
        flags=flags,
        capacity=capacity * SECTOR,
        grain=grain * SECTOR,
        descriptor=descriptor * SECTOR,
        descriptor_bytes=descriptor_size * SECTOR,
        second=second * SECTOR if flags & SECOND_DIRECTORY else 0,
        directory=None if directory == AT_END else directory * SECTOR,
        overhead=overhead * SECTOR,
        is_unclean=bool(raw[72]),
    )


def _check_tables(header: SparseHeader, image_size: int) -> None:
    if not header.capacity:
        raise corrupt("vmdk", "a disk of 0 bytes is not possible", header.at + 12)
    directory = header.directory or 0
    if directory < HEADER or directory + header.tables * 4 > image_size:
        raise corrupt("vmdk", f"its grain directory lies behind the end of the image ({image_size})", header.at + 56)


async def read_descriptor(reader: RangeReader, header: SparseHeader) -> Descriptor | None:
    """The descriptor inside of a sparse extent; None where it has none."""
    if not header.descriptor or not header.descriptor_bytes:
        return None
    if header.descriptor_bytes > DESCRIPTOR_MAX:
        raise corrupt("vmdk", f"a descriptor of {header.descriptor_bytes} bytes is larger than any disk needs", 36)
    if header.descriptor < HEADER or header.descriptor + header.descriptor_bytes > reader.size:
        raise corrupt("vmdk", f"its descriptor lies behind the end of the image ({reader.size})", 28)
    raw = await reader.read(header.descriptor, header.descriptor_bytes)
    return parse_descriptor(raw, header.descriptor) if raw.strip(b"\0") else None


async def _join(descriptor: Descriptor, extents: Extents, *, strict: bool) -> JoinedVmdk:
    parts: list[tuple[int, MappedImage]] = []
    base = 0
    for line, reader in zip(descriptor.extents, _matched(descriptor.extents, extents), strict=True):
        if reader is not None:
            parts.append((base, await _open_extent(line, reader, strict=strict)))
        base += line.size
    return JoinedVmdk(descriptor, parts)


def _matched(lines: Sequence[ExtentLine], extents: Extents) -> list[RangeReader | None]:
    """The reader of each extent; None for those of zeros."""
    stored = [one for one in lines if one.kind != "ZERO"]
    for one in stored:
        if one.kind != "SPARSE" and one.kind not in FLAT_KINDS:
            raise unsupported("vmdk", f"an extent of the kind {one.kind[:20]}", 0)
        if not one.name or "/" in one.name or "\\" in one.name or one.name in (".", ".."):
            raise corrupt("vmdk", f"an extent has the name {one.name[:80]!r}, which leads to another folder", 0)
    if isinstance(extents, Mapping):
        if missing := sorted({one.name for one in stored} - extents.keys()):
            raise misnamed("vmdk", f"no file was named for the extent {missing[0]!r}", hint="Name it as well.")
        if unused := sorted(extents.keys() - {one.name for one in stored}):
            raise misnamed("vmdk", f"the descriptor has no extent {unused[0]!r}")
        return [None if one.kind == "ZERO" else extents[one.name] for one in lines]
    if len(extents) != len(stored):
        raise misnamed(
            "vmdk",
            f"{len(extents)} files were named, the descriptor has {len(stored)} extents",
            hint="Name all of them, in the order of the descriptor.",
        )
    given = iter(extents)
    return [None if one.kind == "ZERO" else next(given) for one in lines]


async def _open_extent(line: ExtentLine, reader: RangeReader, *, strict: bool) -> MappedImage:
    if line.kind in FLAT_KINDS:
        if line.start + line.size > reader.size:
            raise corrupt("vmdk", f"a flat extent ends early: it has {reader.size} bytes", line.start + line.size)
        return FlatExtent(reader, line.size, start=line.start)
    _refuse_relatives(await reader.read(0, min(HEADER, reader.size)))
    header = await read_header(reader, strict=strict)
    if header.capacity < line.size:
        raise corrupt("vmdk", f"an extent has {header.capacity} bytes, its descriptor says {line.size}", 12)
    return SparseExtent(reader, header, size=line.size, strict=strict)


def _refuse_relatives(start: bytes) -> None:
    if start.startswith(COWD_MAGIC):
        raise unsupported("vmdk", "the ESX sparse format COWD", 0)
    if len(start) >= 8 and struct.unpack_from("<Q", start)[0] == SESPARSE_MAGIC:
        raise unsupported("vmdk", "the ESX sparse format SEsparse", 0)
