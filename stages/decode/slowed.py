"""Read no faster than the user allowed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stages.decode.image import HoleAware

if TYPE_CHECKING:
    from pipeline.flow.items import RangeReader
    from pipeline.flow.pacing import RateLimit


class SlowedReader:
    """A RangeReader whose bytes wait until they may come. `limit` is shared by everything that it counts for."""

    def __init__(self, reader: RangeReader, limit: RateLimit) -> None:
        self._reader = reader
        self._limit = limit

    @property
    def size(self) -> int:
        """Of the object, in bytes."""
        return self._reader.size

    @property
    def state(self) -> Any:
        """What the object was when it was opened, where its store says."""
        return getattr(self._reader, "state", None)

    async def read(self, offset: int, length: int) -> bytes:
        """As the reader's, once `length` more bytes may come."""
        await self._limit.wait(length)
        return await self._reader.read(offset, length)


class SlowedHoleAwareReader(SlowedReader):
    """One that knows where its object has no storage; asking costs nothing."""

    async def next_data(self, offset: int) -> range | None:
        """As the reader's."""
        reader = self._reader
        assert isinstance(reader, HoleAware)
        return await reader.next_data(offset)


def slowed(reader: RangeReader, limit: RateLimit) -> RangeReader:
    """The same reader, slowed down; itself where there is no limit."""
    if limit.bytes_per_s is None:
        return reader
    return SlowedHoleAwareReader(reader, limit) if isinstance(reader, HoleAware) else SlowedReader(reader, limit)
