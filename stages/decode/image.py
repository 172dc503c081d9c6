"""What every reader of a disk image offers, and how it fetches guest bytes in few large reads.

Reading is in two steps. `fetch` runs on the event loop and does the input; `decode` is pure and runs in a worker
thread. What an image says is data: offsets and counts are checked before they are used, names in it are never opened.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from pipeline.flow.items import RangeReader
from pipeline.units import KiB, MiB

# Neighbours in the image are read together across a gap of this size: 64 KiB cost less than a round trip to any store.
GAP_MAX = 64 * KiB
# Gaps may add this much to what one fetch reads, so that many tiny clusters far apart can't multiply its memory.
GAPS_PER_FETCH = MiB
# One range read. Larger ones gain nothing on loopback and hold their bytes longer.
READ_MAX = 8 * MiB


@dataclass(frozen=True, slots=True)
class Extent:
    """A stretch of guest bytes: stored in the image, or reading as zero without being stored."""

    offset: int
    length: int
    is_zero: bool

    @property
    def end(self) -> int:
        """Guest offset of the first byte behind it."""
        return self.offset + self.length


@dataclass(frozen=True, slots=True)
class Stretch:
    """Guest bytes that lie together in the image.

    Attributes:
        offset, length: guest bytes.
        at, stored: where in the image, and how many bytes there.
        packed_from: guest offset where the compressed cluster begins that holds them; None: stored as they are.
    """

    offset: int
    length: int
    at: int
    stored: int
    packed_from: int | None = None


@dataclass(frozen=True, slots=True)
class Fetched:
    """The stored bytes of a guest range, not decoded yet. What no part covers reads as zero."""

    offset: int
    length: int
    parts: tuple[tuple[Stretch, memoryview], ...]


class DecodedImage(Protocol):
    """A disk image that was opened: its header was read and every number in it checked.

    All offsets are guest bytes. Safe to use from many tasks at once.

    Attributes:
        format: as in `Layout.format`.
        size: of the virtual disk.
        warnings: what is odd about the image but does not stop a reader.
    """

    @property
    def format(self) -> str: ...

    @property
    def size(self) -> int: ...

    @property
    def warnings(self) -> tuple[str, ...]: ...

    def extents(self, offset: int, length: int) -> AsyncIterator[Extent]:
        """Tile [offset, offset + length), ascending. Costs reads of tables, never of data.

        Raises:
            FormatError: a table is damaged.
            StoreError: it can't be read.
        """
        ...

    async def fetch(self, offset: int, length: int) -> Fetched:
        """Read the stored bytes of [offset, offset + length) in few large reads.

        Holds at most twice the stored bytes of `length` guest bytes, rounded out to clusters, and 1 MiB.

        Raises:
            FormatError: the image is damaged or ends early there.
            StoreError: it can't be read.
        """
        ...

    def decode(self, fetched: Fetched, into: memoryview) -> None:
        """Write `fetched.length` guest bytes into `into`. Pure. Threads: any, several at once.

        Raises:
            FormatError: a cluster does not unpack to exactly its size.
        """
        ...

    async def read(self, offset: int, length: int) -> bytes:
        """`length` guest bytes, decoded on the spot: for small reads."""
        ...


@runtime_checkable
class HoleAware(Protocol):
    """A RangeReader that knows where its object has no storage."""

    async def next_data(self, offset: int) -> range | None:
        """The first stretch with storage that ends behind `offset`; None where zeros follow up to the end."""
        ...


async def stored_ranges(reader: RangeReader, start: int, end: int) -> AsyncIterator[range]:
    """What of [start, end) has storage, in bytes of the reader's object: all of it where the reader knows no holes."""
    if not isinstance(reader, HoleAware):
        if start < end:
            yield range(start, end)
        return
    while start < end:
        data = await reader.next_data(start)
        if data is None or data.start >= end:
            return
        yield range(max(start, data.start), min(end, data.stop))
        start = data.stop


async def tile(data: AsyncIterator[range], offset: int, end: int) -> AsyncIterator[Extent]:
    """Turn ascending stretches of stored guest bytes inside [offset, end) into extents that cover it."""
    position = offset
    async for stretch in data:
        if stretch.start > position:
            yield Extent(position, stretch.start - position, is_zero=True)
        yield Extent(stretch.start, stretch.stop - stretch.start, is_zero=False)
        position = stretch.stop
    if position < end:
        yield Extent(position, end - position, is_zero=True)


async def gather(reader: RangeReader, offset: int, length: int, stretches: Sequence[Stretch]) -> Fetched:
    """Read every stretch; neighbours in the image share one read."""
    found: dict[Stretch, memoryview] = {}
    for span, members in _spans(stretches):
        data = memoryview(await reader.read(span.start, len(span)))
        for one in members:
            found[one] = data[one.at - span.start : one.at - span.start + one.stored]
    return Fetched(offset, length, tuple((one, found[one]) for one in stretches))


def _spans(stretches: Iterable[Stretch]) -> Iterable[tuple[range, list[Stretch]]]:
    """Image ranges to read, ascending, each with the stretches inside it."""
    gaps_left = GAPS_PER_FETCH
    members: list[Stretch] = []
    start = end = 0
    for one in sorted(stretches, key=lambda stretch: stretch.at):
        stop = one.at + one.stored
        gap = max(0, one.at - end)
        if members and gap <= min(GAP_MAX, gaps_left) and max(end, stop) - start <= READ_MAX:
            gaps_left -= gap
            members.append(one)
            end = max(end, stop)
            continue
        if members:
            yield range(start, end), members
        members, start, end = [one], one.at, stop
    if members:
        yield range(start, end), members


def fill(fetched: Fetched, into: memoryview) -> Iterable[tuple[Stretch, memoryview, memoryview]]:
    """Zero what no part covers and copy what is stored as it is; yields (stretch, stored, target) of the packed rest.

    Parts ascend in guest order and don't overlap.
    """
    position = 0
    for stretch, stored in fetched.parts:
        start = stretch.offset - fetched.offset
        target = into[start : start + stretch.length]
        _clear(into, position, start)
        if stretch.packed_from is None:
            target[:] = stored
        else:
            yield stretch, stored, target
        position = start + stretch.length
    _clear(into, position, fetched.length)


def _clear(into: memoryview, start: int, stop: int) -> None:
    if start < stop:
        into[start:stop] = bytes(stop - start)
