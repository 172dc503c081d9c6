"""Images that are stretches of guest bytes: what readers of block tables have in common.

A format says where guest bytes are stored (`_stretches`) and how a packed piece is opened (`unpack`); tiling, fetching
in few reads, and the bounds on time and memory are here.
"""

from __future__ import annotations

import struct
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace

import anyio

from pipeline.errors import FormatError
from pipeline.flow.items import RangeReader
from pipeline.units import GiB, KiB, MiB
from stages.decode.image import READ_MAX, Extent, Fetched, Stretch, fill, gather, stored_ranges, tile
from stages.decode.places import Place
from stages.decode.refusal import corrupt

# One page of a table: a range read costs a round trip, and neighbours are wanted next.
PAGE = 64 * KiB
# Pages kept for all windows in flight; 4 MiB are every block table of a 2 TiB disk but VMDK's.
_PAGES_KEPT = 4 * MiB
# A table that is read alone; VMDK's.
_LONELY = 2 * KiB
# A stretch of data is told at the latest after so many guest bytes, so that whoever copies can begin.
_TOLD_AFTER = GiB
# Entries looked at in one go: a batch of empty ones is passed over at the speed of memory.
_BATCH = 4096
# The least that a packed piece takes in an image; more of them than fit are a table that points to one again and again.
_PACKED_MIN = 512


class Pages:
    """The tables of an image, read in aligned pages, the last few kept. For many tasks at once.

    Args:
        page: bytes read at once; 0: just what is asked for, for tables that stand alone between data.
    """

    def __init__(self, reader: RangeReader, format: str, *, page: int = PAGE) -> None:
        self._reader = reader
        self._format = format
        self._page = page
        self._kept: OrderedDict[int, bytes] = OrderedDict()
        self._lock = anyio.Lock()

    async def read(self, at: int, length: int) -> bytes:
        """Exactly `length` bytes at image offset `at`.

        Raises:
            FormatError: the image ends before.
            StoreError: it can't be read.
        """
        if at < 0 or at + length > self._reader.size:
            raise corrupt(self._format, f"a table lies behind the end of the image ({self._reader.size})", at)
        if not self._page:
            return await self._load(at, length)
        made = bytearray()
        for number in range(at // self._page, -(-(at + length) // self._page)):
            start = number * self._page
            page = await self._load(start, min(self._page, self._reader.size - start))
            made += page[max(0, at - start) : at + length - start]
        return bytes(made)

    async def entries(
        self, at: int, first: int, last: int, *, code: str, empty: int, base: int = 0
    ) -> AsyncIterator[tuple[int, int]]:
        """(index, value) of the entries in [first, last) of the table at `at` that are not `empty` in every byte.

        Args:
            code: of one entry, as in `struct`, with its byte order.
            empty: value of each byte of an entry that says nothing.
            base: added to every index.
        """
        width = struct.calcsize(code)
        for start in range(first, last, _BATCH):
            stop = min(start + _BATCH, last)
            batch = await self.read(at + start * width, (stop - start) * width)
            for index, value in nonempty(batch, code=code, empty=empty):
                yield base + start + index, value

    async def _load(self, start: int, length: int) -> bytes:
        if start not in self._kept or len(self._kept[start]) != length:
            async with self._lock:
                if start not in self._kept or len(self._kept[start]) != length:
                    self._kept[start] = await self._reader.read(start, length)
                    while len(self._kept) > max(2, _PAGES_KEPT // (self._page or _LONELY)):
                        self._kept.popitem(last=False)
                return self._kept[start]
        self._kept.move_to_end(start)
        return self._kept[start]


def nonempty(batch: bytes, *, code: str, empty: int) -> Iterator[tuple[int, int]]:
    """Index and value of the entries of a table that are not `empty` in every byte."""
    if batch.count(empty) == len(batch):
        return
    width = struct.calcsize(code)
    nothing = int.from_bytes(bytes([empty]) * width, "big")
    for index, value in enumerate(struct.unpack(f"{code[0]}{len(batch) // width}{code[1]}", batch)):
        if value != nothing:
            yield index, value


class MappedImage(ABC):
    """An open image whose tables say where blocks of the guest disk are stored.

    Attributes:
        format, size, warnings: as in `DecodedImage`.
        is_packed: the file as a whole is compressed, so that offsets in it mean nothing to its users.
    """

    format = ""
    is_packed = False

    def __init__(self, reader: RangeReader, size: int, warnings: tuple[str, ...] = ()) -> None:
        self._reader = reader
        self.size = size
        self.warnings = warnings

    @abstractmethod
    def _stretches(self, offset: int, end: int) -> AsyncIterator[Stretch]:
        """What is stored of [offset, end), ascending, cut to it; checked against the image's bounds."""

    def unpack(self, stretch: Stretch, stored: memoryview) -> bytes:
        """The guest bytes from `stretch.packed_from` on. Threads: any.

        Raises:
            FormatError: they can't be had of what is stored.
        """
        raise AssertionError(f"{self.format} images have no packed parts")

    def extents(self, offset: int, length: int) -> AsyncIterator[Extent]:
        """Tile the range; a stretch of stored bytes is a few GiB at most."""
        self._check_range(offset, length)
        return tile(self._stored(offset, offset + length), offset, offset + length)

    async def fetch(self, offset: int, length: int) -> Fetched:
        """Read the stored bytes of the range."""
        self._check_range(offset, length)
        stretches: list[Stretch] = []
        async for one in self._stretches(offset, offset + length):
            for piece in _in_pieces(one):
                last = stretches[-1] if stretches else None
                if last is not None and follows(piece, last):
                    stretches[-1] = replace(last, length=last.length + piece.length, stored=last.stored + piece.stored)
                else:
                    stretches.append(piece)
        return await gather(self._reader, offset, length, stretches)

    def decode(self, fetched: Fetched, into: memoryview) -> None:
        """Unpack what is packed. Threads: any."""
        for stretch, stored, target in fill(fetched, into):
            skip = stretch.offset - (stretch.packed_from or 0)
            target[:] = self.unpack(stretch, stored)[skip : skip + stretch.length]

    async def read(self, offset: int, length: int) -> bytes:
        """`length` guest bytes, decoded on the spot."""
        made = bytearray(length)
        self.decode(await self.fetch(offset, length), memoryview(made))
        return bytes(made)

    async def places(self, offset: int, length: int) -> AsyncIterator[Place]:
        """What is stored of the range and where; what is left out reads as zero."""
        self._check_range(offset, length)
        room = self._reader.size
        async for one in self._stretches(offset, offset + length):
            room -= one.stored if one.packed_from is None else min(one.stored, _PACKED_MIN)
            if room < 0:
                raise self._corrupt("its tables point to more data than the image holds: blocks overlap", one.at)
            is_plain = one.packed_from is None and not self.is_packed
            yield Place(one.offset, one.length, "data" if is_plain else "packed", one.at if is_plain else None)

    def _check_range(self, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > self.size:
            raise ValueError(f"[{offset}, {offset + length}) is not inside a disk of {self.size} bytes")

    async def _stored(self, offset: int, end: int) -> AsyncIterator[range]:
        """Guest ranges that hold data, merged where they touch."""
        start = stop = offset
        room = self._reader.size
        async for one in self._stretches(offset, end):
            room -= one.stored if one.packed_from is None else min(one.stored, _PACKED_MIN)
            if room < 0:
                raise self._corrupt("its tables point to more data than the image holds: blocks overlap", one.at)
            if one.offset != stop or stop - start >= _TOLD_AFTER:
                if start < stop:
                    yield range(start, stop)
                start = one.offset
            stop = one.offset + one.length
        if start < stop:
            yield range(start, stop)

    def _corrupt(self, reason: str, offset: int | None, guest_offset: int | None = None) -> FormatError:
        return corrupt(self.format, reason, offset, guest_offset)


class FlatImage(MappedImage):
    """A disk stored as it is, from `start` of the file on. Its holes are those that the reader knows (local files)."""

    def __init__(self, reader: RangeReader, size: int, warnings: tuple[str, ...] = (), *, start: int = 0) -> None:
        super().__init__(reader, size, warnings)
        self._start = start

    async def places(self, offset: int, length: int) -> AsyncIterator[Place]:
        """The range, each byte at its own place; holes are zeros there."""
        async for one in self.extents(offset, length):
            yield Place(one.offset, one.length, "zero" if one.is_zero else "data", self._start + one.offset)

    async def _stretches(self, offset: int, end: int) -> AsyncIterator[Stretch]:
        async for part in stored_ranges(self._reader, self._start + offset, self._start + end):
            yield Stretch(part.start - self._start, len(part), part.start, len(part))


def follows(one: Stretch, last: Stretch) -> bool:
    """Whether both are stored as they are, side by side in guest and image, and small enough to be read as one."""
    return (
        one.packed_from is None
        and last.packed_from is None
        and one.offset == last.offset + last.length
        and one.at == last.at + last.stored
        and last.stored + one.stored <= READ_MAX
    )


def _in_pieces(one: Stretch) -> Iterator[Stretch]:
    """A stretch in parts that one read may carry."""
    if one.packed_from is not None or one.stored <= READ_MAX:
        yield one
        return
    for start in range(0, one.length, READ_MAX):
        length = min(READ_MAX, one.length - start)
        yield Stretch(one.offset + start, length, one.at + start, length)


class Section:
    """A part of an object as a RangeReader of its own: a member of an archive, a disk in front of its footer."""

    def __init__(self, reader: RangeReader, offset: int, size: int, *, format: str) -> None:
        self._reader = reader
        self._offset = offset
        self._format = format
        self.size = size

    async def read(self, offset: int, length: int) -> bytes:
        """As in RangeReader; offsets count from the section's begin. Never reads outside of it."""
        if offset < 0 or length < 0 or offset + length > self.size:
            raise corrupt(self._format, f"something wants bytes behind the end of its section ({self.size})", offset)
        return await self._reader.read(self._offset + offset, length)
