"""Bytes of a file that lie in several places of a partition; what lies nowhere reads as zero."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from pipeline.errors import FormatError
from pipeline.flow.items import RangeReader
from stages.disk.reading import GAP_MAX, READ_MAX


@dataclass(frozen=True, slots=True)
class Placed:
    """A stretch of a file and where it is.

    Attributes:
        offset, length: bytes of the file.
        at: offset of its first byte in the partition.
    """

    offset: int
    length: int
    at: int

    @property
    def end(self) -> int:
        """Offset in the file of the first byte behind it."""
        return self.offset + self.length


async def read_placed(reader: RangeReader, places: Iterable[Placed], offset: int, length: int) -> bytes:
    """Bytes [offset, offset + length) of a file. Neighbours in the partition are read together.

    Holds `length` bytes and one read beside it. What `places` says outside of the range is left out.

    Raises:
        FormatError: a stretch lies outside of the partition, or two of them are of the same bytes.
    """
    end = offset + length
    clipped = []
    for one in sorted(places, key=lambda place: place.offset):
        begin, stop = max(one.offset, offset), min(one.end, end)
        if begin < stop:
            clipped.append(Placed(begin, stop - begin, one.at + begin - one.offset))
    if len(clipped) == 1 and clipped[0].length == length <= READ_MAX:
        return await reader.read(clipped[0].at, length)
    made = bytearray(length)
    position = offset
    for one in clipped:
        if one.offset < position:
            raise FormatError("a file has two places for the same bytes", offset=one.offset)
        position = one.end
    for group in _together(clipped):
        start = group[0].at
        data = await reader.read(start, group[-1].at + group[-1].length - start)
        for one in group:
            made[one.offset - offset : one.end - offset] = data[one.at - start : one.at - start + one.length]
    return bytes(made)


def _together(places: list[Placed]) -> Iterable[list[Placed]]:
    """Places that one read takes: ascending in the partition too, small gaps between them, READ_MAX at most."""
    group: list[Placed] = []
    for whole in places:
        for at in range(0, whole.length, READ_MAX):
            one = Placed(whole.offset + at, min(READ_MAX, whole.length - at), whole.at + at)
            if group:
                reach = group[-1].at + group[-1].length
                if 0 <= one.at - reach <= GAP_MAX and one.at + one.length - group[0].at <= READ_MAX:
                    group.append(one)
                    continue
                yield group
            group = [one]
    if group:
        yield group
