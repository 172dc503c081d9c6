"""Read a raw image: the guest bytes are the image bytes."""

from __future__ import annotations

from collections.abc import AsyncIterator

from pipeline.flow.items import RangeReader
from stages.decode.image import READ_MAX, Extent, Fetched, Stretch, fill, gather, stored_ranges, tile
from stages.decode.places import Place


class RawImage:
    """A raw image. Holes are known only where the reader knows them (local files)."""

    format = "raw"
    warnings: tuple[str, ...] = ()

    def __init__(self, reader: RangeReader) -> None:
        self._reader = reader
        self.size = reader.size

    def extents(self, offset: int, length: int) -> AsyncIterator[Extent]:
        """Tile the range: as the reader knows its holes, else all of it is stored."""
        return tile(stored_ranges(self._reader, offset, offset + length), offset, offset + length)

    async def fetch(self, offset: int, length: int) -> Fetched:
        """Read the range as it is."""
        stretches = [
            Stretch(start, min(READ_MAX, offset + length - start), start, min(READ_MAX, offset + length - start))
            for start in range(offset, offset + length, READ_MAX)
        ]
        return await gather(self._reader, offset, length, stretches)

    async def places(self, offset: int, length: int) -> AsyncIterator[Place]:
        """The range, each byte at its own offset; holes are zeros where the reader knows them."""
        async for one in self.extents(offset, length):
            yield Place(one.offset, one.length, "zero" if one.is_zero else "data", one.offset)

    def decode(self, fetched: Fetched, into: memoryview) -> None:
        """Copy it. Threads: any."""
        for _ in fill(fetched, into):
            raise AssertionError("a raw image has no packed parts")

    async def read(self, offset: int, length: int) -> bytes:
        """`length` guest bytes."""
        return await self._reader.read(offset, length)


async def open_raw(reader: RangeReader, *, strict: bool = False) -> RawImage:
    """Open a raw image. There is nothing to check: its length is the disk's size."""
    return RawImage(reader)
