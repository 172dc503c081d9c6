"""Read a qcow2 image, versions 2 and 3: plain, zlib and zstd clusters.

Nothing in the image is believed: every table, pointer and count is checked before it is followed or allocated. What
this reader does not know (backing file, data file, encryption, subclusters) is refused by name, never skipped. Internal
snapshots and refcounts are not needed for reading the active disk, and are not looked at.

Source: QEMU docs/interop/qcow2, sections "Header", "Host cluster management" and "L1 and L2 tables".
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass

import anyio

from pipeline.errors import FormatError
from pipeline.flow.items import RangeReader
from pipeline.units import MiB
from stages.decode.compressed import Unpackable, expand_zstd, inflate
from stages.decode.image import READ_MAX, Extent, Fetched, Stretch, fill, gather, tile
from stages.decode.places import Place
from stages.decode.refusal import misnamed, unsupported

_MAGIC = b"QFI\xfb"
_V2_HEADER = 72
_V3_HEADER_MIN = 104
_COMPRESSION_TYPE_AT = 104
_CLUSTER_BITS = range(9, 22)
_NAME_MAX = 1023
_L1_BYTES_MAX = 32 * MiB  # as in QEMU; 2 EiB with the largest clusters

_DIRTY, _CORRUPT, _DATA_FILE, _COMPRESSION_TYPE, _EXTENDED_L2 = (1 << bit for bit in range(5))
_KNOWN_INCOMPATIBLE = _DIRTY | _CORRUPT | _DATA_FILE | _COMPRESSION_TYPE | _EXTENDED_L2

_COPIED = 1 << 63
_COMPRESSED = 1 << 62
_OFFSET_MASK = 0x00FF_FFFF_FFFF_FE00
_READS_AS_ZERO = 1
_L1_RESERVED = ~(_COPIED | _OFFSET_MASK) & (1 << 64) - 1
_L2_RESERVED = ~(_COPIED | _OFFSET_MASK | _READS_AS_ZERO) & (1 << 64) - 1
_HOST_MAX = 1 << 56

# L2 tables kept: 4 MiB cover 32 GiB of disk with clusters of 64 KiB. Less makes parallel windows read tables twice.
_L2_CACHE = 4 * MiB
# Entries looked at in one go: a batch of zeros is passed over at the speed of memory.
_BATCH = 512

_COMPRESSION = ("zlib", "zstd")


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What reading needs of a header that was checked. Offsets are image bytes."""

    version: int
    cluster_bits: int
    size: int
    l1_offset: int
    l1_entries: int
    compression: str
    is_dirty: bool
    snapshots: int
    is_overlay: bool

    @property
    def cluster(self) -> int:
        """Bytes of a cluster."""
        return 1 << self.cluster_bits

    @property
    def l2_entries(self) -> int:
        """Clusters that one L2 table maps."""
        return self.cluster // 8

    @property
    def l2_span(self) -> int:
        """Guest bytes that one L2 table maps."""
        return self.cluster * self.l2_entries

    @property
    def l1_needed(self) -> int:
        """L1 entries that the disk's size calls for."""
        return -(-self.size // self.l2_span)


class Qcow2Image:
    """An open qcow2 image. Holds its L1 table (32 MiB at most) and a few L2 tables."""

    format = "qcow2"

    def __init__(self, reader: RangeReader, header: Header, l1: bytearray, *, strict: bool) -> None:
        self._reader = reader
        self._header = header
        self._l1 = l1
        self._strict = strict
        self._l2: OrderedDict[int, bytes] = OrderedDict()
        self._l2_lock = anyio.Lock()
        self.size = header.size
        self.warnings: tuple[str, ...] = ()
        if header.is_dirty:
            self.warnings = ("the image was not closed properly (dirty bit); its refcounts may be wrong",)

    @property
    def header(self) -> Header:
        """What its header says."""
        return self._header

    def extents(self, offset: int, length: int) -> AsyncIterator[Extent]:
        """Tile the range; a stretch of stored bytes ends at the latest where its L2 table does."""
        self._check_range(offset, length)
        return tile(self._stored(offset, offset + length), offset, offset + length)

    async def fetch(self, offset: int, length: int) -> Fetched:
        """Read the stored bytes of the range."""
        self._check_range(offset, length)
        stretches: list[Stretch] = []
        async for guest, entry in self._entries(offset, offset + length):
            one = self._stretch(guest, entry, offset, offset + length)
            if one is None:
                continue
            last = stretches[-1] if stretches else None
            if last is not None and _follows(one, last):
                stretches[-1] = Stretch(last.offset, last.length + one.length, last.at, last.stored + one.stored)
            else:
                stretches.append(one)
        return await gather(self._reader, offset, length, stretches)

    def decode(self, fetched: Fetched, into: memoryview) -> None:
        """Unpack every cluster of the range. Threads: any."""
        cluster = self._header.cluster
        for stretch, stored, target in fill(fetched, into):
            try:
                if self._header.compression == "zstd":
                    data = expand_zstd(stored, cluster)
                else:
                    data = inflate(stored, cluster, strict=self._strict)
            except Unpackable as error:
                raise _corrupt(f"a compressed cluster can't be unpacked: {error}", stretch.at, stretch.offset) from None
            skip = stretch.offset - (stretch.packed_from or 0)
            target[:] = data if len(data) == stretch.length else data[skip : skip + stretch.length]

    async def read(self, offset: int, length: int) -> bytes:
        """`length` guest bytes, decoded on the spot."""
        made = bytearray(length)
        self.decode(await self.fetch(offset, length), memoryview(made))
        return bytes(made)

    async def places(self, offset: int, length: int) -> AsyncIterator[Place]:
        """What the image says about the range, cluster by cluster; what is left out is not allocated."""
        self._check_range(offset, length)
        end = offset + length
        async for guest, entry in self._entries(offset, end):
            start = max(guest, offset)
            size = min(guest + self._header.cluster, end) - start
            if entry & _COMPRESSED:
                self._packed(guest, entry)
                yield Place(start, size, "packed")
                continue
            host = self._plain_offset(guest, entry)
            if host is not None:
                yield Place(start, size, "data", host + start - guest)
            elif entry & _READS_AS_ZERO:
                host = entry & _OFFSET_MASK
                yield Place(start, size, "zero", host + start - guest if host else None)

    def _check_range(self, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > self.size:
            raise ValueError(f"[{offset}, {offset + length}) is not inside a disk of {self.size} bytes")

    async def _stored(self, offset: int, end: int) -> AsyncIterator[range]:
        """Guest ranges that hold data, merged where they touch inside one L2 table."""
        start = stop = offset
        async for guest, entry in self._entries(offset, end):
            if not entry & _COMPRESSED and self._plain_offset(guest, entry) is None:
                continue
            if stop != guest or (guest % self._header.l2_span == 0 and start < stop):
                if start < stop:
                    yield range(start, stop)
                start = max(offset, guest)
            stop = min(end, guest + self._header.cluster)
        if start < stop:
            yield range(start, stop)

    async def _entries(self, offset: int, end: int) -> AsyncIterator[tuple[int, int]]:
        """(guest offset, L2 entry) of every cluster in the range whose entry is not 0, ascending."""
        if offset >= end:
            return
        header = self._header
        for index, l1_entry in _nonzero(self._l1, offset // header.l2_span, (end - 1) // header.l2_span + 1):
            base = index * header.l2_span
            table = await self._table(index, l1_entry)
            first = max(0, offset - base) // header.cluster
            last = -(-(min(end - base, header.l2_span)) // header.cluster)
            for number, entry in _nonzero(table, first, last):
                yield base + number * header.cluster, entry

    async def _table(self, index: int, l1_entry: int) -> bytes:
        """The L2 table that an L1 entry points to."""
        at = l1_entry & _OFFSET_MASK
        cluster = self._header.cluster
        where = self._header.l1_offset + index * 8
        if l1_entry & _L1_RESERVED:
            raise _corrupt("reserved bits are set in an L1 entry", where)
        if at % cluster or not cluster <= at <= self._reader.size - cluster:
            raise _corrupt(f"an L1 entry points to {at}, where no L2 table can be", where)
        if self._strict and not l1_entry & _COPIED:
            raise _corrupt("an L1 entry lacks the bit that says it is used once", where)
        if at in self._l2:
            self._l2.move_to_end(at)
            return self._l2[at]
        async with self._l2_lock:
            if at not in self._l2:
                self._l2[at] = await self._reader.read(at, cluster)
                # Two at least, however large: windows beside a table's border need both.
                while len(self._l2) > max(2, _L2_CACHE // cluster):
                    self._l2.popitem(last=False)
            return self._l2[at]

    def _stretch(self, guest: int, entry: int, offset: int, end: int) -> Stretch | None:
        """Where the part of a cluster inside [offset, end) is stored; None: it reads as zero."""
        start = max(guest, offset)
        length = min(guest + self._header.cluster, end) - start
        if entry & _COMPRESSED:
            at, stored = self._packed(guest, entry)
            return Stretch(start, length, at, stored, packed_from=guest)
        host = self._plain_offset(guest, entry)
        if host is None:
            return None
        # Writers may leave the last cluster of the file short behind the end of the disk, but a byte of the disk
        # itself that is missing is a truncated image. QEMU would read zeros there.
        wanted = self._header.cluster if self._strict else min(self._header.cluster, self.size - guest)
        if host + wanted > self._reader.size:
            raise _corrupt(f"a cluster of the disk lies behind the end of the image ({self._reader.size})", host, guest)
        return Stretch(start, length, host + start - guest, length)

    def _plain_offset(self, guest: int, entry: int) -> int | None:
        """Image offset of an uncompressed cluster; None: it reads as zero."""
        host = entry & _OFFSET_MASK
        reads_as_zero = bool(entry & _READS_AS_ZERO)
        if entry & _L2_RESERVED or (reads_as_zero and self._header.version == 2):
            raise _corrupt("reserved bits are set in an L2 entry", None, guest)
        if host % self._header.cluster:
            raise _corrupt("an L2 entry points between two clusters", host, guest)
        if self._strict and (host or entry & _COPIED) and not (host and entry & _COPIED):
            raise _corrupt("an L2 entry is not marked as used once", host, guest)
        return None if reads_as_zero or not host else host

    def _packed(self, guest: int, entry: int) -> tuple[int, int]:
        """Image offset and bytes of a compressed cluster, with what follows it in its last sector."""
        bits = self._header.cluster_bits
        offset_bits = 62 - (bits - 8)
        at = entry & (1 << offset_bits) - 1
        sectors = (entry >> offset_bits & (1 << bits - 8) - 1) + 1
        end = (at // 512 + sectors) * 512
        if self._strict and entry & _COPIED:
            raise _corrupt("a compressed cluster is marked as used once", at, guest)
        if not _V2_HEADER <= at < min(_HOST_MAX, self._reader.size) or (self._strict and end > self._reader.size):
            raise _corrupt(f"a compressed cluster lies outside of the image ({self._reader.size})", at, guest)
        # The last sector may be cut off by the end of the file; a stream that is cut will not unpack.
        return at, min(end, self._reader.size) - at


async def open_qcow2(
    reader: RangeReader, *, strict: bool = False, is_overlay: bool = False, is_alone: bool = False
) -> Qcow2Image:
    """Read and check header and L1 table.

    Args:
        strict: refuse what our own encoder never writes: snapshots, a dirty bit, deflate windows above 4 KiB, clusters
            not used exactly once, a length that is not whole clusters.
        is_overlay: the caller has the backing image, and reads what this one does not hold from it (`OverlayImage`).
        is_alone: only this file is looked at, be it an overlay or not. What it does not hold reads as zero.
    Raises:
        FormatError: not qcow2, damaged, hostile, or using a feature that is not read here.
        StoreError: it can't be read.
    """
    if reader.size < _V2_HEADER:
        raise _corrupt(f"{reader.size} bytes are too few for a qcow2 header", 0)
    header = _parse(await reader.read(0, min(reader.size, 512)), reader.size, is_overlay=is_overlay, is_alone=is_alone)
    if strict:
        _be_strict(header, reader.size)
    l1 = bytearray(header.l1_needed * 8)
    for start in range(0, len(l1), READ_MAX):
        length = min(READ_MAX, len(l1) - start)
        l1[start : start + length] = await reader.read(header.l1_offset + start, length)
    return Qcow2Image(reader, header, l1, strict=strict)


def _parse(raw: bytes, image_size: int, *, is_overlay: bool, is_alone: bool) -> Header:
    if raw[:4] != _MAGIC:
        raise _corrupt(f"the image does not begin like a qcow2 image but with {raw[:4].hex(' ')}", 0)
    version, backing, named, cluster_bits, size, crypt, l1_entries, l1_offset = struct.unpack_from(">IQIIQIIQ", raw, 4)
    (snapshots,) = struct.unpack_from(">I", raw, 60)
    if version not in (2, 3):
        raise _unsupported(f"qcow2 version {version}", 4)
    if cluster_bits not in _CLUSTER_BITS:
        raise _corrupt(f"clusters of 2^{cluster_bits} bytes are not possible", 20)
    incompatible, compression = _parse_v3(raw, cluster_bits) if version == 3 else (0, "zlib")
    if backing and (named > _NAME_MAX or backing + named > 1 << cluster_bits):
        raise _corrupt(f"the name of its backing file ({named} bytes) can't be at {backing}", 8)
    if backing and not (is_overlay or is_alone):
        hint = "Name it yourself (backing = [...], --backing FILE); the name inside the image is never opened."
        raise misnamed("qcow2", "the image lies on a backing file that was not named", hint=hint)
    if is_overlay and not backing:
        raise misnamed("qcow2", "a backing image was named for an image that has none")
    if crypt:
        raise _unsupported("encryption", 32, "Decrypt it first, or read the disk inside the guest.")
    header = Header(
        version=version,
        cluster_bits=cluster_bits,
        size=size,
        l1_offset=l1_offset,
        l1_entries=l1_entries,
        compression=compression,
        is_dirty=bool(incompatible & _DIRTY),
        snapshots=snapshots,
        is_overlay=bool(backing),
    )
    _check_tables(header, image_size)
    return header


def _parse_v3(raw: bytes, cluster_bits: int) -> tuple[int, str]:
    """Incompatible features and the name of the compression."""
    if len(raw) < _V3_HEADER_MIN:
        raise _corrupt("the image ends inside its header", len(raw))
    (incompatible,) = struct.unpack_from(">Q", raw, 72)
    (header_length,) = struct.unpack_from(">I", raw, 100)
    if header_length % 8 or not _V3_HEADER_MIN <= header_length <= 1 << cluster_bits:
        raise _corrupt(f"a header of {header_length} bytes is not possible", 100)
    if unknown := incompatible & ~_KNOWN_INCOMPATIBLE:
        bits = ", ".join(str(bit) for bit in range(64) if unknown >> bit & 1)
        raise _unsupported(f"unknown incompatible features (bits {bits})", 72)
    if incompatible & _CORRUPT:
        raise _corrupt("the image is marked as corrupt", 72, hint='Repair a copy with "qemu-img check -r all".')
    if incompatible & _DATA_FILE:
        raise _unsupported("an external data file", 72, 'Join both first: "qemu-img convert" writes one image.')
    if incompatible & _EXTENDED_L2:
        raise _unsupported(
            "subclusters (extended L2 entries)", 72, "Convert it first: qemu-img convert -O qcow2 -o extended_l2=off."
        )
    kind = 0
    if header_length > _COMPRESSION_TYPE_AT:
        if len(raw) <= _COMPRESSION_TYPE_AT:
            raise _corrupt("the image ends inside its header", len(raw))
        kind = raw[_COMPRESSION_TYPE_AT]
    if bool(kind) != bool(incompatible & _COMPRESSION_TYPE):
        raise _corrupt("compression type and its feature bit contradict each other", _COMPRESSION_TYPE_AT)
    if kind >= len(_COMPRESSION):
        raise _unsupported(f"compression type {kind}", _COMPRESSION_TYPE_AT)
    return incompatible, _COMPRESSION[kind]


def _check_tables(header: Header, image_size: int) -> None:
    l1_bytes = header.l1_entries * 8
    if header.size >= 1 << 63:
        raise _corrupt(f"a disk of {header.size} bytes is not possible", 24)
    if l1_bytes > _L1_BYTES_MAX:
        raise _corrupt(f"an L1 table of {l1_bytes} bytes is larger than any image needs ({_L1_BYTES_MAX})", 36)
    if header.l1_entries < header.l1_needed:
        raise _corrupt(f"its L1 table is too small: {header.l1_entries} entries, {header.l1_needed} are needed", 36)
    if header.l1_entries and (header.l1_offset % header.cluster or not header.l1_offset):
        raise _corrupt(f"an L1 table can't be at {header.l1_offset}", 40)
    if header.l1_offset + l1_bytes > image_size:
        raise _corrupt(f"its L1 table lies behind the end of the image ({image_size})", header.l1_offset)


def _be_strict(header: Header, image_size: int) -> None:
    """Refuse what our own encoder never writes."""
    if header.is_dirty or header.snapshots:
        raise _corrupt("the image has a dirty bit or snapshots, which no export writes", 60)
    if image_size % header.cluster:
        raise _corrupt(f"an image of {image_size} bytes is not whole clusters of {header.cluster}", image_size)


def _nonzero(table: bytes | bytearray, first: int, last: int) -> Iterator[tuple[int, int]]:
    """Index and value of the 64-bit entries in [first, last) that are not 0."""
    for start in range(first, last, _BATCH):
        batch = table[start * 8 : min(start + _BATCH, last) * 8]
        if batch.count(0) == len(batch):
            continue
        for index, entry in enumerate(struct.unpack(f">{len(batch) // 8}Q", batch), start):
            if entry:
                yield index, entry


def _follows(one: Stretch, last: Stretch) -> bool:
    """Whether both are stored as they are, side by side in guest and image, and small enough to be read as one."""
    return (
        one.packed_from is None
        and last.packed_from is None
        and one.offset == last.offset + last.length
        and one.at == last.at + last.stored
        and last.stored + one.stored <= READ_MAX
    )


def _corrupt(reason: str, offset: int | None, guest_offset: int | None = None, *, hint: str = "") -> FormatError:
    """`offset` is an image offset."""
    return FormatError(
        reason,
        operation="read qcow2",
        offset=offset,
        guest_offset=guest_offset,
        hint=hint or "The image is damaged, incomplete or made to mislead. Fetch or export it again.",
    )


def _unsupported(feature: str, offset: int, hint: str = "") -> FormatError:
    return unsupported("qcow2", feature, offset, hint=hint)
