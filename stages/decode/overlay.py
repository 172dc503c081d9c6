"""A qcow2 image on top of another image: what the upper one does not hold is read from the lower one.

The lower image is named by the user. The name that the upper one has for it is never looked at.

Source: QEMU docs/interop/qcow2, "Header", field backing_file_offset; "Standard Cluster Descriptor": an unallocated
cluster reads from the backing file, and as zero behind its end.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, replace

from stages.decode.image import DecodedImage, Extent, Fetched
from stages.decode.places import Place, tiled
from stages.decode.qcow2 import Qcow2Image


@dataclass(frozen=True, slots=True)
class Layered(Fetched):
    """The stored bytes of both images; `below` are ranges that the upper one does not hold."""

    below: tuple[Fetched, ...] = ()


class OverlayImage:
    """An upper image and what is below it; both are borrowed. `lower` may be an overlay itself."""

    format = "qcow2"

    def __init__(self, upper: Qcow2Image, lower: DecodedImage) -> None:
        self._upper = upper
        self._lower = lower
        self.size = upper.size
        self.warnings = (*upper.warnings, *lower.warnings)

    async def extents(self, offset: int, length: int) -> AsyncIterator[Extent]:
        """Tile the range, as both images say."""
        async for start, stop, is_zero in self._told(offset, length):
            if is_zero is not None:
                yield Extent(start, stop - start, is_zero)
                continue
            middle = self._covered(start, stop)
            if start < middle:
                async for extent in self._lower.extents(start, middle - start):
                    yield extent
            if middle < stop:
                yield Extent(middle, stop - middle, is_zero=True)

    async def fetch(self, offset: int, length: int) -> Layered:
        """Read the stored bytes of the range from both."""
        upper = await self._upper.fetch(offset, length)
        below = []
        async for start, stop, is_zero in self._told(offset, length):
            middle = self._covered(start, stop)
            if is_zero is None and start < middle:
                below.append(await self._lower.fetch(start, middle - start))
        return Layered(offset, length, upper.parts, tuple(below))

    def decode(self, fetched: Fetched, into: memoryview) -> None:
        """Unpack what both hold. Threads: any."""
        self._upper.decode(fetched, into)
        for part in fetched.below if isinstance(fetched, Layered) else ():
            start = part.offset - fetched.offset
            self._lower.decode(part, into[start : start + part.length])

    async def read(self, offset: int, length: int) -> bytes:
        """`length` guest bytes, decoded on the spot."""
        made = bytearray(length)
        self.decode(await self.fetch(offset, length), memoryview(made))
        return bytes(made)

    async def places(self, offset: int, length: int) -> AsyncIterator[Place]:
        """What each image of the chain says; what none has belongs to the lowest one that reaches so far."""
        async for place in tiled(self._upper, offset, length):
            if place.kind != "hole":
                yield place
                continue
            middle = self._covered(place.offset, place.end)
            if place.offset < middle:
                async for below in tiled(self._lower, place.offset, middle - place.offset):
                    yield replace(below, depth=below.depth + 1)
            if middle < place.end:
                yield Place(middle, place.end - middle, "hole")

    async def _told(self, offset: int, length: int) -> AsyncIterator[tuple[int, int, bool | None]]:
        """Tile the range as (start, stop, whether the upper image has zeros there); None: it says nothing."""
        position, end = offset, offset + length
        start = offset
        is_zero: bool | None = None
        async for place in self._upper.places(offset, length):
            told = place.kind == "zero"
            if place.offset > position or told is not is_zero:
                if start < position:
                    yield start, position, is_zero
                if position < place.offset:
                    yield position, place.offset, None
                start, is_zero = place.offset, told
            position = place.end
        if start < position:
            yield start, position, is_zero
        if position < end:
            yield position, end, None

    def _covered(self, start: int, stop: int) -> int:
        """Where the lower image ends inside [start, stop)."""
        return max(start, min(stop, self._lower.size))
