"""Where an image keeps its guest bytes: the map that `pipeline inspect --map` shows."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import Literal, Protocol, runtime_checkable

from stages.decode.image import DecodedImage


@dataclass(frozen=True, slots=True)
class Place:
    """A stretch of guest bytes and where the image has it.

    Attributes:
        offset, length: guest bytes.
        kind: stored as it is, compressed, marked as zeros, or not in the image (`hole`: it reads as zero).
        at: image offset of the first byte; None where there is none, or it means nothing to a reader of the file.
        depth: which image of a chain tells so: 0 is the upper one, 1 the one that it lies on. `at` is an offset there.
    """

    offset: int
    length: int
    kind: Literal["data", "packed", "zero", "hole"]
    at: int | None = None
    depth: int = 0

    @property
    def end(self) -> int:
        """Guest offset of the first byte behind it."""
        return self.offset + self.length


@runtime_checkable
class Placing(Protocol):
    """An image that knows where in its file guest bytes are."""

    def places(self, offset: int, length: int) -> AsyncIterator[Place]:
        """What the image says about the range, ascending, in small steps; what is left out is not in the image.

        Raises:
            FormatError: a table is damaged.
            StoreError: it can't be read.
        """
        ...


async def map_image(image: DecodedImage) -> AsyncIterator[Place]:
    """Tile the whole disk; neighbours of one kind that are also neighbours in the image are one place.

    Costs reads of tables, never of data. Raises as `Placing.places`.
    """
    last: Place | None = None
    async for place in tiled(image, 0, image.size):
        if last is not None and _continues(place, last):
            last = replace(last, length=last.length + place.length)
            continue
        if last is not None:
            yield last
        last = place
    if last is not None:
        yield last


async def tiled(image: DecodedImage, offset: int, length: int) -> AsyncIterator[Place]:
    """Tile the range in small steps. Raises as `Placing.places`."""
    position, end = offset, offset + length
    async for place in _told(image, offset, length):
        if place.offset > position:
            yield Place(position, place.offset - position, "hole")
        yield place
        position = place.end
    if position < end:
        yield Place(position, end - position, "hole")


async def _told(image: DecodedImage, offset: int, length: int) -> AsyncIterator[Place]:
    if isinstance(image, Placing):
        async for place in image.places(offset, length):
            yield place
        return
    async for extent in image.extents(offset, length):
        if not extent.is_zero:
            yield Place(extent.offset, extent.length, "data")


def _continues(one: Place, last: Place) -> bool:
    if one.kind != last.kind or one.depth != last.depth or (one.at is None) != (last.at is None):
        return False
    return one.at is None or last.at is None or one.at == last.at + last.length
