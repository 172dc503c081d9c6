"""The begin of a stored object as an object of its own."""

from __future__ import annotations

from pipeline.errors import FormatError
from pipeline.flow.items import RangeReader


class FirstBytes:
    """The first bytes of a reader as a reader of its own: a disk may be larger than the image on it."""

    def __init__(self, reader: RangeReader, size: int) -> None:
        self._reader = reader
        self.size = size

    async def read(self, offset: int, length: int) -> bytes:
        """As wrapped. Raises FormatError for what lies behind."""
        if offset < 0 or length < 0 or offset + length > self.size:
            raise FormatError("the image ends before this range", operation="read", offset=offset, size=self.size)
        return await self._reader.read(offset, length)
