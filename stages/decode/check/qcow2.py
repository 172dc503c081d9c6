"""Check a qcow2 image: header, tables, and every refcount counted again.

Memory: one window of the image's clusters is counted at a time (`CLUSTERS_MAX`), so that an image of any size is
checked in about 100 MiB; what is larger takes several passes over the tables. Tables that are referenced more than
once (by snapshots, or by an attacker) are read once and weighed by their references.

Source: QEMU docs/interop/qcow2, "Header", "Header extensions", "Host cluster management", "L1 and L2 tables",
"Snapshots", "Bitmaps".
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import anyio
import numpy as np

from pipeline.errors import FormatError, first_error
from pipeline.flow.items import RangeReader
from pipeline.units import KiB, MiB
from stages.decode.check.blocks import read_everything
from stages.decode.check.report import ImageInfo, Tally
from stages.decode.image import READ_MAX
from stages.decode.qcow2 import Header, Qcow2Image, open_qcow2
from stages.decode.refusal import UnsupportedError, corrupt

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Words = NDArray[np.uint64]

# Clusters counted at once: 4 bytes for each that the tables reference and 4 for what the refcounts say. With 64 KiB a
# window is 512 GiB of image file; twice as much would halve the passes over larger ones and double the memory.
CLUSTERS_MAX = 8 * MiB
# Table bytes worked on at once.
_TABLES_AT_ONCE = 2 * MiB
# Reads under way at once, for stores where each is a round trip.
_PARALLEL = 8
# Tables this near to each other are read together.
_GAP_MAX = 64 * KiB

_COPIED = np.uint64(1 << 63)
_COMPRESSED = np.uint64(1 << 62)
_OFFSET = np.uint64(0x00FF_FFFF_FFFF_FE00)
_L1_RESERVED = np.uint64(~(1 << 63 | 0x00FF_FFFF_FFFF_FE00) & (1 << 64) - 1)
_L2_RESERVED = np.uint64(~(1 << 63 | 0x00FF_FFFF_FFFF_FE00 | 1) & (1 << 64) - 1)
_RT_RESERVED = np.uint64(511)
_TOLD = 8

_REFCOUNT_TABLE_MAX = 8 * MiB
_L1_BYTES_MAX = 32 * MiB
_SNAPSHOTS_MAX = 65536
_SNAPSHOT_BYTES_MAX = 64 * MiB
_BITMAPS_MAX = 65535
_BITMAP_BYTES_MAX = 64 * MiB
_EXTENSION_NAMES = {
    0xE2792ACA: "backing format",
    0x6803F857: "feature names",
    0x23852875: "bitmaps",
    0x0537BE77: "encryption",
    0x44415441: "data file",
}
_BITMAPS = 0x23852875
_AUTOCLEAR_BITMAPS, _AUTOCLEAR_RAW_DATA = 1, 2


@dataclass(frozen=True, slots=True, kw_only=True)
class _More:
    """What a reader does not need of the header. Offsets are image bytes."""

    l1_entries: int
    compatible: int
    autoclear: int
    refcount_offset: int
    refcount_bytes: int
    refcount_order: int
    snapshots: int
    snapshots_offset: int
    extensions: tuple[tuple[int, int, int], ...]
    backing: str | None


@dataclass(frozen=True, slots=True)
class _Run:
    """Clusters of metadata, each referenced `count` times: image clusters [first, last)."""

    first: int
    last: int
    name: str
    count: int = 1


@dataclass(slots=True)
class _Tables:
    """Every L2 table, once: where it is, how often L1 tables reference it, and the active L1 entry that does first."""

    at: Words
    weight: NDArray[np.int64]
    active: NDArray[np.int64]  # index of the first active L1 entry, -1 where only snapshots use the table


async def check_qcow2(
    reader: RangeReader, *, deep: bool, strict: bool, is_overlay: bool = False, window: int = CLUSTERS_MAX
) -> Tally:
    """Check an image; of an overlay, this file alone. As `checking.check`."""
    tally = Tally("qcow2")
    try:
        image = await open_qcow2(reader, is_overlay=is_overlay, is_alone=True)
        more = _parse_more(await reader.read(0, min(reader.size, image.header.cluster)), image.header)
        tally.info = _info(image, more, reader.size)
        if more.backing is not None and not is_overlay:
            tally.warning("the image lies on a backing file that was not named: only this file is checked", 8)
        await _Check(reader, image, more, tally, strict=strict, window=window).run()
    except FormatError as error:
        if isinstance(error, UnsupportedError):
            raise
        tally.stop(error)
        return tally
    if deep:
        await _unpack_everything(reader, image, tally)
    return tally


async def qcow2_info(reader: RangeReader) -> ImageInfo:
    """What the header says."""
    image = await open_qcow2(reader, is_alone=True)
    more = _parse_more(await reader.read(0, min(reader.size, image.header.cluster)), image.header)
    return _info(image, more, reader.size)


def _info(image: Qcow2Image, more: _More, file_size: int) -> ImageInfo:
    header = image.header
    flags = (
        ("dirty", header.is_dirty),
        ("lazy refcounts", bool(more.compatible & 1)),
        ("bitmaps", bool(more.autoclear & _AUTOCLEAR_BITMAPS)),
    )
    return ImageInfo(
        format="qcow2",
        variant=f"version {header.version}",
        virtual_size=header.size,
        file_size=file_size,
        block_size=header.cluster,
        compression=header.compression,
        flags=tuple(name for name, is_set in flags if is_set),
        details=(
            *(("backing file", repr(more.backing)) for _ in range(more.backing is not None)),
            ("refcount bits", str(1 << more.refcount_order)),
            ("snapshots", str(more.snapshots)),
            ("extensions", ", ".join(_EXTENSION_NAMES.get(kind, f"{kind:#x}") for kind, _, _ in more.extensions)),
        ),
    )


def _parse_more(raw: bytes, header: Header) -> _More:
    refcount_offset, refcount_clusters, snapshots, snapshots_offset = struct.unpack_from(">QIIQ", raw, 48)
    compatible = autoclear = 0
    order, length = 4, 72
    if header.version == 3:
        compatible, autoclear, order, length = struct.unpack_from(">QQII", raw, 80)
    (l1_entries,) = struct.unpack_from(">I", raw, 36)
    if order > 6:
        raise corrupt("qcow2", f"refcounts of 2^{order} bits are not possible", 96)
    return _More(
        l1_entries=l1_entries,
        compatible=compatible,
        autoclear=autoclear,
        refcount_offset=refcount_offset,
        refcount_bytes=refcount_clusters * header.cluster,
        refcount_order=order,
        snapshots=snapshots,
        snapshots_offset=snapshots_offset,
        extensions=tuple(_extensions(raw, length)),
        backing=_backing_name(raw) if header.is_overlay else None,
    )


def _backing_name(raw: bytes) -> str:
    """What the image calls its backing file; `raw` is the first cluster. For the user's eyes: it is never opened."""
    at, length = struct.unpack_from(">QI", raw, 8)
    return bytes(raw[at : at + length]).decode(errors="replace")


def _extensions(raw: bytes, at: int) -> Iterable[tuple[int, int, int]]:
    """(type, image offset of its data, bytes) of every header extension; `raw` is the first cluster."""
    while at + 8 <= len(raw):
        kind, length = struct.unpack_from(">II", raw, at)
        if kind == 0:
            return
        if at + 8 + length > len(raw):
            raise corrupt("qcow2", f"a header extension of {length} bytes does not fit into the first cluster", at + 4)
        yield kind, at + 8, length
        at += 8 + -(-length // 8) * 8


class _Check:
    """One check of one image. Everything bounded: tables are claimed by the file's size before they are read."""

    def __init__(
        self, reader: RangeReader, image: Qcow2Image, more: _More, tally: Tally, *, strict: bool, window: int
    ) -> None:
        self._reader = reader
        self._header = image.header
        self._more = more
        self._tally = tally
        self._strict = strict
        self._window = window
        self._cluster = image.header.cluster
        self._bits = image.header.cluster_bits
        self._clusters = -(-reader.size // self._cluster)
        self._runs: list[_Run] = []
        self._loose: Counter[int] = Counter()  # clusters of bitmap data
        self._last_host = 0

    async def run(self) -> None:
        """Find all references, then compare them with the refcounts, window by window."""
        self._check_header()
        table = await self._refcount_table()
        l1 = await self._l1()
        l2 = await self._l2_tables(l1)
        await self._bitmaps()
        self._tally.blocks = -(-self._header.size // self._cluster)
        self._tally.metadata_bytes = (sum(run.last - run.first for run in self._runs) + int(l2.at.size)) * self._cluster
        for low in range(0, self._clusters, self._window):
            await self._check_window(low, min(low + self._window, self._clusters), table, l1, l2)

    def _check_header(self) -> None:
        header, more, tally = self._header, self._more, self._tally
        self._claim(0, self._cluster, "header")
        # An image with an external data file is refused before.
        if more.autoclear & _AUTOCLEAR_RAW_DATA:
            tally.corruption("the image says that its external data file is raw, and has no data file", 88)
        if header.is_dirty:
            tally.warning("the image was not closed properly (dirty bit); its refcounts may be wrong", 72)
        if self._strict:
            if self._reader.size % self._cluster:
                tally.corruption("the image is not whole clusters, as an export is", self._reader.size)
            if more.snapshots or header.is_dirty:
                tally.corruption("the image has snapshots or a dirty bit, which no export writes", 60)

    async def _refcount_table(self) -> Words:
        """The refcount table, its reserved bits and pointers checked; entries that can't be followed are 0."""
        at, length = self._more.refcount_offset, self._more.refcount_bytes
        if not length or length > _REFCOUNT_TABLE_MAX:
            raise corrupt("qcow2", f"a refcount table of {length} bytes is not possible", 56)
        self._demand(at, length, "refcount table", 48)
        self._claim(at, length, "refcount table")
        table = await self._words(at, length)
        self._report(table & _RT_RESERVED != 0, "reserved bits are set in a refcount table entry", at, 8)
        offsets = table & ~_RT_RESERVED
        bad = (offsets != 0) & ~self._can_be(offsets)
        self._report(bad, "a refcount table entry points to where no refcount block can be", at, 8)
        offsets = np.where(bad, np.uint64(0), offsets)
        blocks, counts = np.unique(offsets[offsets != 0], return_counts=True)
        for block, count in zip(blocks.tolist(), counts.tolist(), strict=True):
            self._runs.append(_Run(block >> self._bits, (block >> self._bits) + 1, "refcount block", count))
        return offsets

    async def _l1(self) -> Words:
        """The active L1 table, all of its entries."""
        length = self._more.l1_entries * 8
        if not length:
            return np.zeros(0, np.uint64)
        self._demand(self._header.l1_offset, length, "L1 table", 40)
        self._claim(self._header.l1_offset, length, "L1 table")
        return await self._words(self._header.l1_offset, length)

    async def _l2_tables(self, active: Words) -> _Tables:
        """Every L2 table that the active L1 table and those of snapshots point to."""
        offsets = [self._checked_l1(active, self._header.l1_offset)]
        weights = [np.ones(offsets[0].size, np.int64)]
        for (at, entries), count in (await self._snapshots()).items():
            found = self._checked_l1(await self._words(at, entries * 8), at)
            unique, counts = np.unique(found[found != 0], return_counts=True)
            offsets.append(unique)
            weights.append(counts.astype(np.int64) * count)
        every, weight = np.concatenate(offsets), np.concatenate(weights)
        unique, first, inverse = np.unique(every, return_index=True, return_inverse=True)
        total = np.bincount(inverse, weights=weight, minlength=unique.size).astype(np.int64)
        index = np.where(first < active.size, first, -1)
        keep = unique != 0
        unique, total, index = unique[keep], total[keep], index[keep]
        order = np.argsort(np.where(index < 0, np.int64(1 << 62), index), kind="stable")
        return _Tables(unique[order], total[order], index[order])

    def _checked_l1(self, table: Words, at: int) -> Words:
        """Offsets of L2 tables; 0 where an entry can't be followed."""
        self._report(table & _L1_RESERVED != 0, "reserved bits are set in an L1 entry", at, 8)
        offsets = table & _OFFSET
        bad = (offsets != 0) & ~self._can_be(offsets)
        self._report(bad, "an L1 entry points to where no L2 table can be", at, 8)
        return np.where(bad, np.uint64(0), offsets)

    async def _snapshots(self) -> Counter[tuple[int, int]]:
        """(image offset, entries) of the L1 tables of snapshots, each once."""
        found: Counter[tuple[int, int]] = Counter()
        count, at = self._more.snapshots, self._more.snapshots_offset
        if not count:
            return found
        if count > _SNAPSHOTS_MAX:
            raise corrupt("qcow2", f"{count} snapshots are more than possible", 60)
        start = at
        self._demand(at, count * 40, "snapshot table", 64)
        for _ in range(count):
            entry = await self._reader.read(at, 40)
            offset, entries, id_length, name_length = struct.unpack_from(">QIHH", entry)
            (extra,) = struct.unpack_from(">I", entry, 36)
            if entries * 8 > _L1_BYTES_MAX:
                raise corrupt("qcow2", f"a snapshot has an L1 table of {entries} entries", at + 8)
            if entries:
                self._demand(offset, entries * 8, "L1 table of a snapshot", at)
                found[offset, entries] += 1
            at += -(-(40 + extra + id_length + name_length) // 8) * 8
            if at - start > _SNAPSHOT_BYTES_MAX or at > self._reader.size + 8:
                raise corrupt("qcow2", "the snapshot table lies behind the end of the image", start)
        self._claim(start, at - start, "snapshot table")
        for (offset, entries), times in found.items():
            self._claim(offset, entries * 8, "L1 table of a snapshot", times)
        return found

    async def _bitmaps(self) -> None:
        """Claim the clusters of persistent bitmaps. Without the autoclear bit they are stale, and count for nothing."""
        place = next(((at, length) for kind, at, length in self._more.extensions if kind == _BITMAPS), None)
        if place is None:
            return
        if not self._more.autoclear & _AUTOCLEAR_BITMAPS:
            self._tally.warning("the image has bitmaps that an older program made invalid", place[0])
            return
        if place[1] < 24:
            raise corrupt("qcow2", "the bitmaps extension is too short", place[0])
        count, _, length, start = struct.unpack(">IIQQ", await self._reader.read(place[0], 24))
        if not 0 < count <= _BITMAPS_MAX or not 24 * count <= length <= _BITMAP_BYTES_MAX:
            raise corrupt("qcow2", f"{count} bitmaps in {length} bytes are not possible", place[0])
        self._demand(start, length, "bitmap directory", place[0])
        self._claim(start, length, "bitmap directory")
        directory = await self._bytes(start, length)
        at = 0
        for _ in range(count):
            if at + 24 > length:
                raise corrupt("qcow2", "the bitmap directory is too short", start + at)
            table, entries, _, _, _, name, extra = struct.unpack_from(">QIIBBHI", directory, at)
            self._demand(table, entries * 8, "bitmap table", start + at)
            if entries * 8 > _BITMAP_BYTES_MAX:
                raise corrupt("qcow2", f"a bitmap table of {entries} entries is not possible", start + at)
            self._claim(table, entries * 8, "bitmap table")
            offsets = await self._words(table, entries * 8) & _OFFSET
            bad = (offsets != 0) & ~self._can_be(offsets)
            self._report(bad, "a bitmap lies where no cluster can be", table, 8)
            for offset in offsets[(offsets != 0) & ~bad].tolist():
                self._loose[offset >> self._bits] += 1
            at += -(-(24 + extra + name) // 8) * 8

    async def _check_window(self, low: int, high: int, table: Words, l1: Words, l2: _Tables) -> None:
        """Count the references to image clusters [low, high) and compare them with their refcounts."""
        stored = await self._stored(low, high, table)
        counted = np.zeros(high - low, np.uint32)
        for run in self._runs:
            if run.first < high and run.last > low:
                counted[max(run.first, low) - low : min(run.last, high) - low] += np.uint32(run.count)
        for cluster, count in self._loose.items():
            if low <= cluster < high:
                counted[cluster - low] += np.uint32(count)
        tables = (l2.at >> np.uint64(self._bits)).astype(np.int64) - low
        inside = (tables >= 0) & (tables < high - low)
        np.add.at(counted, tables[inside], l2.weight[inside].astype(np.uint32))
        self._check_l1_copied(low, high, stored, l1)
        async for entries, first, last in self._batches(l2):
            self._check_entries(entries, l2, slice(first, last), low, high, stored, counted)
        self._check_metadata(low, high, stored, counted, l2, tables, inside)
        self._compare(low, stored, counted)

    async def _stored(self, low: int, high: int, table: Words) -> NDArray[np.uint32]:
        """What the refcounts of clusters [low, high) say, at most 2^32 - 1."""
        made = np.zeros(high - low, np.uint32)
        per_block = self._cluster * 8 >> self._more.refcount_order
        first, last = low // per_block, min(-(-high // per_block), table.size)
        wanted = [index for index in range(first, last) if table[index]]
        for start in range(0, len(wanted), max(1, _TABLES_AT_ONCE // self._cluster)):
            indexes = wanted[start : start + max(1, _TABLES_AT_ONCE // self._cluster)]
            for index, raw in zip(indexes, await self._many([int(table[one]) for one in indexes]), strict=True):
                counts = _refcounts(raw, self._more.refcount_order)
                begin, end = max(low, index * per_block), min(high, (index + 1) * per_block)
                made[begin - low : end - low] = counts[begin - index * per_block : end - index * per_block]
        return made

    def _check_l1_copied(self, low: int, high: int, stored: NDArray[np.uint32], l1: Words) -> None:
        place = ((l1 & _OFFSET) >> np.uint64(self._bits)).astype(np.int64)
        inside = (place >= max(low, 1)) & (place < high)
        once = stored[np.where(inside, place - low, 0)] == 1
        wrong = inside & (once != ((l1 & _COPIED) != 0))
        self._report(
            wrong, "the bit for being used once and the refcount of an L2 table differ", self._header.l1_offset, 8
        )

    async def _batches(self, l2: _Tables) -> AsyncIterator[tuple[Words, int, int]]:
        """Entries of a few L2 tables at once, as rows, with the numbers of the first and behind the last table."""
        step = max(1, _TABLES_AT_ONCE // self._cluster)
        for first in range(0, l2.at.size, step):
            raw = await self._many([int(at) for at in l2.at[first : first + step]])
            entries = np.frombuffer(b"".join(raw), ">u8").astype(np.uint64)
            yield entries.reshape(len(raw), -1), first, first + len(raw)

    def _check_entries(
        self,
        entries: Words,
        l2: _Tables,
        rows: slice,
        low: int,
        high: int,
        stored: NDArray[np.uint32],
        counted: NDArray[np.uint32],
    ) -> None:
        weight = np.broadcast_to(l2.weight[rows, None], entries.shape)
        index = l2.active[rows]
        is_active = np.broadcast_to((index >= 0)[:, None], entries.shape)
        packed = (entries & _COMPRESSED) != 0
        offset = entries & _OFFSET
        plain = ~packed & (offset != 0)
        followed = plain & (offset % np.uint64(self._cluster) == 0) & (offset < np.uint64(self._reader.size))
        host = (offset >> np.uint64(self._bits)).astype(np.int64) - low
        inside = followed & (host >= 0) & (host < high - low)
        np.add.at(counted, host[inside], weight[inside].astype(np.uint32))
        once = stored[np.where(inside, host, 0)] == 1
        wrong = inside & is_active & (once != ((entries & _COPIED) != 0))
        self._report_guest(wrong, "the bit for being used once and the refcount of a cluster differ", offset, index)
        start, end = self._packed_range(entries)
        valid = packed & (start >= 72) & (start < self._reader.size)
        first, last = start >> self._bits, (end - 1) >> self._bits
        step = 0
        while (more := valid & (first + step <= last)).any():
            place = first + step - low
            inside = more & (place >= 0) & (place < high - low)
            np.add.at(counted, place[inside], weight[inside].astype(np.uint32))
            step += 1
        if low == 0:
            self._check_each(entries, packed, plain, followed, valid, start, end, index)

    def _check_each(
        self,
        entries: Words,
        packed: NDArray[np.bool_],
        plain: NDArray[np.bool_],
        followed: NDArray[np.bool_],
        valid: NDArray[np.bool_],
        start: NDArray[np.int64],
        end: NDArray[np.int64],
        index: NDArray[np.int64],
    ) -> None:
        """What is wrong with an entry by itself; counts what the active disk has."""
        offset = entries & _OFFSET
        reserved = ~packed & ((entries & _L2_RESERVED) != 0)
        zero = ~packed & ((entries & np.uint64(1)) != 0)
        if self._header.version == 2:
            reserved |= zero
        self._report_guest(reserved, "reserved bits are set in an L2 entry", offset, index)
        unaligned = plain & (offset % np.uint64(self._cluster) != 0)
        self._report_guest(unaligned, "an L2 entry points between two clusters", offset, index)
        self._report_guest(plain & ~unaligned & ~followed, "a cluster lies behind the end of the image", offset, index)
        self._report_guest(packed & ~valid, "a compressed cluster lies outside of the image", start, index)
        padded = self._clusters * self._cluster
        self._report_guest(valid & (end > padded), "a compressed cluster ends behind the image", start, index)
        marked = packed & ((entries & _COPIED) != 0)
        self._report_guest(marked, "a compressed cluster is marked as used once", start, index)
        alone = ~packed & ~plain & ((entries & _COPIED) != 0)
        self._report_guest(alone, "an L2 entry without a cluster is marked as used once", offset, index)
        self._check_size(followed & ~zero, offset, index)
        active = index >= 0
        self._tally.data_blocks += int(np.count_nonzero((plain & ~zero)[active]))
        self._tally.packed_blocks += int(np.count_nonzero(packed[active]))
        self._tally.zero_blocks += int(np.count_nonzero(zero[active]))
        if self._strict:
            self._check_order(np.where(packed, start, offset.astype(np.int64))[active], index[active])

    def _check_size(self, stored: NDArray[np.bool_], offset: Words, index: NDArray[np.int64]) -> None:
        """A cluster may be cut off by the end of the file only behind the end of the disk."""
        tail = self._reader.size % self._cluster
        if not tail:
            return
        last = np.uint64(self._reader.size - tail)
        for row, column in np.argwhere(stored & (offset == last)).tolist():
            guest = self._guest(int(index[row]), column)
            if guest is None or min(self._cluster, self._header.size - guest) > tail:
                self._tally.corruption("a cluster is cut off by the end of the image", int(last), guest)

    def _check_order(self, place: NDArray[np.int64], index: NDArray[np.int64]) -> None:
        flat = place.reshape(-1)
        used = np.flatnonzero(flat)
        if not used.size:
            return
        places = flat[used]
        back = np.diff(places, prepend=self._last_host) <= 0
        self._last_host = int(places[-1])
        if back.any():
            row, column = divmod(int(used[np.flatnonzero(back)[0]]), place.shape[1])
            self._tally.corruption(
                "clusters are not stored in the order of the disk, as in an export",
                int(place[row, column]),
                self._guest(int(index[row]), column),
                count=int(np.count_nonzero(back)),
            )

    def _packed_range(self, entries: Words) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Image bytes of compressed clusters: begin, and end of the last sector."""
        width = np.uint64(62 - (self._bits - 8))
        start = (entries & (np.uint64(1) << width) - np.uint64(1)).astype(np.int64)
        sectors = (entries >> width & np.uint64((1 << self._bits - 8) - 1)).astype(np.int64)
        return start, (start // 512 + sectors + 1) * 512

    def _check_metadata(
        self,
        low: int,
        high: int,
        stored: NDArray[np.uint32],
        counted: NDArray[np.uint32],
        l2: _Tables,
        tables: NDArray[np.int64],
        inside: NDArray[np.bool_],
    ) -> None:
        """Metadata that something else uses as well, whatever the refcounts say."""
        for run in self._runs:
            part = counted[max(run.first, low) - low : max(0, min(run.last, high) - low)]
            shared = np.flatnonzero(part > 1)
            if shared.size:
                at = (max(run.first, low) + int(shared[0])) * self._cluster
                self._tally.corruption(f"the {run.name} is used for something else, too", at, count=int(shared.size))
            if run.name == "refcount block" and low <= run.first < high and stored[run.first - low] != 1:
                self._tally.corruption("a refcount block has not the refcount 1", run.first * self._cluster)
        shared = np.zeros(tables.size, np.bool_)
        shared[inside] = counted[tables[inside]] > l2.weight[inside]
        for at in l2.at[shared][:_TOLD].tolist():
            self._tally.corruption("an L2 table is used for something else, too", at)
        self._tally.count_more_corruptions(max(0, int(np.count_nonzero(shared)) - _TOLD))

    def _compare(self, low: int, stored: NDArray[np.uint32], counted: NDArray[np.uint32]) -> None:
        for first, last in _runs(stored < counted):
            at = (low + first) * self._cluster
            self._tally.corruption(
                f"{last - first} clusters are used more often than their refcounts say "
                f"(the first {counted[first]} times, refcount {stored[first]})",
                at,
                count=last - first,
            )
        for first, last in _runs(stored > counted):
            at = (low + first) * self._cluster
            self._tally.leak(
                f"{last - first} clusters have a refcount but are used less often "
                f"(the first {counted[first]} times, refcount {stored[first]})",
                at,
                blocks=last - first,
            )

    def _guest(self, l1_index: int, column: int) -> int | None:
        """Guest offset of an L2 entry; None in a table that only snapshots use."""
        if l1_index < 0:
            return None
        return l1_index * self._header.l2_span + column * self._cluster

    def _report(self, wrong: NDArray[np.bool_], message: str, at: int, width: int) -> None:
        """Note the entries of a table at `at` that are wrong: the first few with their places."""
        found = np.flatnonzero(wrong)
        for index in found[:_TOLD].tolist():
            self._tally.corruption(message, at + index * width)
        self._tally.count_more_corruptions(max(0, found.size - _TOLD))

    def _report_guest(
        self, wrong: NDArray[np.bool_], message: str, places: NDArray[np.generic], index: NDArray[np.int64]
    ) -> None:
        """Note L2 entries that are wrong: the first few with their guest offsets."""
        if not wrong.any():
            return
        found = np.argwhere(wrong)
        for row, column in found[:_TOLD].tolist():
            self._tally.corruption(message, int(places[row, column]), self._guest(int(index[row]), column))
        self._tally.count_more_corruptions(max(0, len(found) - _TOLD))

    def _can_be(self, offsets: Words) -> NDArray[np.bool_]:
        """Whether a whole aligned cluster behind the header is there."""
        cluster = np.uint64(self._cluster)
        whole = np.uint64(max(0, self._reader.size - self._cluster))
        possible: NDArray[np.bool_] = (offsets % cluster == 0) & (offsets >= cluster) & (offsets <= whole)
        return possible

    def _demand(self, at: int, length: int, name: str, where: int) -> None:
        if at % self._cluster or not self._cluster <= at <= self._reader.size - length:
            raise corrupt("qcow2", f"a {name} of {length} bytes can't be at {at}", where)

    def _claim(self, at: int, length: int, name: str, count: int = 1) -> None:
        if length:
            self._runs.append(_Run(at >> self._bits, -(-(at + length) // self._cluster), name, count))

    async def _words(self, at: int, length: int) -> Words:
        return np.frombuffer(await self._bytes(at, length), ">u8").astype(np.uint64)

    async def _bytes(self, at: int, length: int) -> bytes:
        made = bytearray()
        for start in range(0, length, READ_MAX):
            made += await self._reader.read(at + start, min(READ_MAX, length - start))
        return bytes(made)

    async def _many(self, offsets: Sequence[int]) -> list[bytes]:
        """The clusters at these image offsets; neighbours in one read, several reads at once."""
        found: dict[int, bytes] = {}
        spans: list[tuple[int, int, list[int]]] = []
        for at in sorted(set(offsets)):
            if spans and at - spans[-1][1] <= _GAP_MAX and at + self._cluster - spans[-1][0] <= READ_MAX:
                begin, _, members = spans.pop()
                spans.append((begin, at + self._cluster, [*members, at]))
            else:
                spans.append((at, at + self._cluster, [at]))
        limiter = anyio.CapacityLimiter(_PARALLEL)

        async def load(begin: int, end: int, members: list[int]) -> None:
            async with limiter:
                data = await self._reader.read(begin, end - begin)
            for at in members:
                found[at] = data[at - begin : at - begin + self._cluster]

        if len(spans) == 1:
            await load(*spans[0])
        else:
            await _together(load, spans)
        return [found[at] for at in offsets]


async def _together(
    load: Callable[[int, int, list[int]], Coroutine[object, object, None]], spans: Sequence[tuple[int, int, list[int]]]
) -> None:
    """Load every span; the first error is raised as itself."""
    try:
        async with anyio.create_task_group() as tasks:
            for span in spans:
                tasks.start_soon(load, *span)
    except ExceptionGroup as group:
        raise first_error(group) from group


def _refcounts(raw: bytes, order: int) -> NDArray[np.uint32]:
    """The refcounts of a block, of 2^order bits each, at most 2^32 - 1."""
    if order >= 3:
        counts = np.frombuffer(raw, f">u{1 << order - 3}")
        return np.minimum(counts, (1 << 32) - 1).astype(np.uint32) if order == 6 else counts.astype(np.uint32)
    # Smaller than a byte: the first is in the lowest bits.
    width = 1 << order
    shifts = np.arange(0, 8, width, dtype=np.uint8)
    packed = np.frombuffer(raw, np.uint8)[:, None] >> shifts & ((1 << width) - 1)
    return packed.reshape(-1).astype(np.uint32)


def _runs(wrong: NDArray[np.bool_]) -> Iterable[tuple[int, int]]:
    """[first, last) of the stretches that are True."""
    edges = np.flatnonzero(np.diff(wrong.astype(np.int8), prepend=0, append=0))
    yield from zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)


async def _unpack_everything(reader: RangeReader, image: Qcow2Image, tally: Tally) -> None:
    """Read every cluster, first as strictly as some readers do; what only they would refuse is a warning."""
    length = image.header.l1_needed * 8
    l1 = bytearray(await reader.read(image.header.l1_offset, length)) if length else bytearray()
    careful = Tally("qcow2")
    await read_everything(Qcow2Image(reader, image.header, l1, strict=True), image.header.cluster, careful)
    if not careful.report(deep=True).corruptions:
        return
    before = tally.report(deep=True).corruptions
    await read_everything(image, image.header.cluster, tally)
    if tally.report(deep=True).corruptions > before:
        return
    for finding in careful.report(deep=True).findings:
        if "unpacked" in finding.message:
            tally.warning(
                f"QEMU reads this, others may not: {finding.message}", finding.image_offset, finding.guest_offset
            )
