"""How the readers of this room reach a disk: any RangeReader, seen through windows, in few and bounded reads.

The same readers so work on local disks, image files, decoded images and objects in a store. Nothing that a disk says is
believed: a range outside the window, or one larger than a read may be, is a FormatError before any byte moves.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import AsyncIterator, Sequence

from pipeline.errors import FormatError
from pipeline.flow.items import RangeReader
from pipeline.units import KiB, MiB

# One read. Bitmaps, FATs and LVM metadata are read in parts of this size at most; larger gains nothing on loopback.
READ_MAX = 4 * MiB
# What is kept for small reads. A block of 64 KiB holds the headers of an allocation group or a few tree nodes; larger
# blocks would read more of the disk than its maps need.
BLOCK = 64 * KiB
CACHE_BYTES = 8 * MiB
# Neighbours are read together across a gap of this size: it costs less than a round trip.
GAP_MAX = 64 * KiB


class CachedReader:
    """A RangeReader in front of another that keeps the last blocks of small reads. Safe from many tasks."""

    def __init__(self, reader: RangeReader, *, cache_bytes: int = CACHE_BYTES) -> None:
        self._reader = reader
        self._kept = max(1, cache_bytes // BLOCK)
        self._blocks: OrderedDict[int, bytes] = OrderedDict()
        self.size = reader.size

    async def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes; those longer than a block pass by the cache."""
        if offset < 0 or length < 0 or offset + length > self.size:
            raise _outside(offset, length, self.size)
        if length > BLOCK:
            return await self._reader.read(offset, length)
        first, last = offset // BLOCK, max(offset, offset + length - 1) // BLOCK
        parts = [await self._block(number) for number in range(first, last + 1)]
        joined = parts[0] if len(parts) == 1 else b"".join(parts)
        start = offset - first * BLOCK
        return joined[start : start + length]

    async def _block(self, number: int) -> bytes:
        found = self._blocks.get(number)
        if found is None:
            start = number * BLOCK
            found = await self._reader.read(start, min(BLOCK, self.size - start)) if start < self.size else b""
            self._blocks[number] = found
            while len(self._blocks) > self._kept:
                self._blocks.popitem(last=False)
        else:
            self._blocks.move_to_end(number)
        return found


class Window:
    """A stretch of a disk as a RangeReader of its own: offset 0 is where it begins."""

    def __init__(self, reader: RangeReader, offset: int, length: int) -> None:
        self._reader = reader
        self._offset = offset
        self.size = length

    async def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes. Raises FormatError outside the window and for more than READ_MAX."""
        if offset < 0 or length < 0 or offset + length > self.size:
            raise _outside(offset, length, self.size)
        if length > READ_MAX:
            raise FormatError("a structure is larger than any real one", operation="read", offset=offset, length=length)
        return await self._reader.read(self._offset + offset, length)


def _outside(offset: int, length: int, size: int) -> FormatError:
    return FormatError(
        "something is said to lie outside of what there is", operation="read", offset=offset, length=length, size=size
    )


async def read_each(reader: RangeReader, offsets: Sequence[int], length: int) -> AsyncIterator[tuple[int, memoryview]]:
    """Read `length` bytes at each offset, neighbours together; yields (index, bytes) in ascending order of offset.

    Holds READ_MAX at most.
    """
    order = sorted(range(len(offsets)), key=offsets.__getitem__)
    at = 0
    while at < len(order):
        start = offsets[order[at]]
        end = start + length
        stop = at + 1
        while stop < len(order):
            following = offsets[order[stop]]
            if following > end + GAP_MAX or following + length - start > max(READ_MAX, length):
                break
            end = max(end, following + length)
            stop += 1
        data = memoryview(await reader.read(start, end - start))
        for index in order[at:stop]:
            begin = offsets[index] - start
            yield index, data[begin : begin + length]
        at = stop
