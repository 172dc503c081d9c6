"""Read a Google Compute Engine image: `disk.raw` in a tar archive, packed with gzip.

The stream is unpacked as it is read: ascending reads cost it once, going back costs up to 16 MiB and more of
unpacking again (`UnpackedStream`). Holes are known where tar recorded them (`tar -S`), otherwise everything is data.

Source: Google Cloud, "Import virtual disks manually", requirements of the image file; GNU tar, "Old GNU Format".
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import AsyncIterator
from contextlib import aclosing

from pipeline.flow.items import RangeReader
from pipeline.units import MiB
from stages.decode.image import Fetched, Stretch
from stages.decode.mapped import MappedImage
from stages.decode.refusal import corrupt
from stages.decode.tar import RECORD, Member, walk
from stages.decode.unpacked import UnpackedStream

DISK = "disk.raw"
# GNU tar pads to 10 KiB, with larger blocking factors to more.
_PADDING_MAX = 2 * MiB


class GceImage(MappedImage):
    """An open GCE archive. Read it in ascending order."""

    format = "gce"
    is_packed = True

    def __init__(self, stream: UnpackedStream, member: Member) -> None:
        super().__init__(stream, member.size)
        self._stream = stream
        self._member = member
        self._is_checked = False
        self._starts, self._lengths = member.stretches or (array("Q", [0]), array("Q", [member.size]))
        self._at = array("Q")  # image offsets, in the stream
        position = member.data
        for length in self._lengths:
            self._at.append(position)
            position += length

    async def fetch(self, offset: int, length: int) -> Fetched:
        """Unpack the range; with the end of the disk, the rest of the archive is checked as well."""
        fetched = await super().fetch(offset, length)
        if offset + length == self.size and not self._is_checked:
            await self.check_end()
        return fetched

    async def check_end(self) -> None:
        """Unpack what follows the disk, to compare the stream's last checksum.

        Raises:
            FormatError: the stream is damaged, cut short, or too long.
        """
        await self._stream.check_end(self._member.data + self._member.stored, padding=_PADDING_MAX)
        self._is_checked = True

    async def _stretches(self, offset: int, end: int) -> AsyncIterator[Stretch]:
        if offset >= end:
            return
        for index in range(max(0, bisect_right(self._starts, offset) - 1), len(self._starts)):
            guest, length = self._starts[index], self._lengths[index]
            if guest >= end:
                return
            start, stop = max(offset, guest), min(end, guest + length)
            if start < stop:
                yield Stretch(start, stop - start, self._at[index] + start - guest, stop - start)


async def open_gce(reader: RangeReader, *, strict: bool = False) -> GceImage:
    """Unpack the archive's first header and check it.

    Args:
        strict: refuse what our own encoder never writes: sparse members, sizes that are not whole GiB.
    Raises:
        FormatError: no such archive, damaged or hostile.
        StoreError: it can't be read.
    """
    stream = UnpackedStream(reader, "gce")
    async with aclosing(walk(stream, "gce")) as members:
        member = await anext(members, None)
    if member is None or member.name.removeprefix("./") != DISK:
        found = "nothing" if member is None else repr(member.name[:80])
        raise corrupt("gce", f"its first member is not {DISK} but {found}", 0)
    if member.size % RECORD:
        raise corrupt("gce", f"a disk of {member.size} bytes is not whole sectors", 124)
    if strict and (member.stretches is not None or member.size % 2**30):
        raise corrupt("gce", "the disk is sparse or not whole GiB, which no export writes", 124)
    return GceImage(stream, member)
