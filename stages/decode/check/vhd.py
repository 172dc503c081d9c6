"""Check a VHD image: both footers, the header, the block table, overlaps, and (deep) the sector bitmaps.

Source: Microsoft, Virtual Hard Disk Image Format Specification 1.0.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import numpy as np

from pipeline.errors import FormatError
from pipeline.flow.items import RangeReader
from pipeline.units import MiB, round_up
from stages.decode import vhd
from stages.decode.check.blocks import find_overlaps, read_everything
from stages.decode.check.report import ImageInfo, Tally
from stages.decode.refusal import UnsupportedError

if TYPE_CHECKING:
    from numpy.typing import NDArray

_TABLE_STEP = MiB
_TOLD = 8


async def check_vhd(reader: RangeReader, *, deep: bool, strict: bool) -> Tally:
    """Check an image. As `checking.check`."""
    tally = Tally("vhd")
    try:
        layout = await vhd.read_layout(reader)
        tally.info = _info(layout, reader.size)
        _check_footers(layout, tally)
        if layout.header is None:
            tally.metadata_bytes = vhd.FOOTER
            tally.blocks = tally.data_blocks = layout.footer.current_size // vhd.SECTOR
        else:
            await _Blocks(reader, layout, layout.header, tally).run(deep=deep)
        if deep:
            image = await vhd.open_vhd(reader)
            await read_everything(image, layout.header.block_size if layout.header else MiB, tally)
    except UnsupportedError:
        raise
    except FormatError as error:
        tally.stop(error)
    return tally


async def vhd_info(reader: RangeReader) -> ImageInfo:
    """What footer and header say."""
    return _info(await vhd.read_layout(reader), reader.size)


def _info(layout: vhd.Layout, file_size: int) -> ImageInfo:
    footer = layout.footer
    return ImageInfo(
        format="vhd",
        variant="fixed" if layout.header is None else "dynamic",
        virtual_size=footer.current_size,
        file_size=file_size,
        block_size=layout.header.block_size if layout.header else 0,
        flags=("saved state",) if footer.has_saved_state else (),
        identity=str(footer.uuid),
        details=(
            ("creator", footer.creator),
            ("geometry", f"{footer.cylinders}/{footer.heads}/{footer.sectors}"),
        ),
    )


def _check_footers(layout: vhd.Layout, tally: Tally) -> None:
    footer = layout.footer
    if layout.header is not None:
        if layout.copy is None:
            tally.corruption("the copy of the footer at the begin is damaged or missing", 0)
        elif layout.tail is None:
            tally.corruption("the footer at the end is damaged or missing", layout.footer_at)
        elif layout.copy.raw != layout.tail.raw:
            tally.corruption("the footers at begin and end differ", layout.footer_at)
    if footer.has_saved_state:
        tally.warning("the guest was suspended: its disk is not at rest", layout.footer_at + 84)
    is_largest = (footer.cylinders, footer.heads, footer.sectors) == (65535, 16, 255)
    if footer.geometry_size != footer.current_size and not is_largest:
        tally.warning(
            f"by its geometry the disk has {footer.geometry_size} bytes, not {footer.current_size}; "
            "some readers believe the geometry",
            layout.footer_at + 56,
        )


class _Blocks:
    """The blocks of a dynamic disk."""

    def __init__(self, reader: RangeReader, layout: vhd.Layout, header: vhd.DynamicHeader, tally: Tally) -> None:
        self._reader = reader
        self._layout = layout
        self._header = header
        self._tally = tally
        self._stride = header.bitmap + header.block_size
        self._last_end = 0

    async def run(self, *, deep: bool) -> None:
        """Check every entry of the block table."""
        header, tally = self._header, self._tally
        table_end = header.table_offset + round_up(header.entries * 4, vhd.SECTOR)
        if header.table_offset < header.at + vhd.HEADER and header.at < table_end:
            tally.corruption("the block table overlaps the header", header.table_offset)
        tally.metadata_bytes = 2 * vhd.FOOTER + vhd.HEADER + table_end - header.table_offset
        tally.blocks = -(-self._layout.footer.current_size // header.block_size)
        first = max(table_end, header.at + vhd.HEADER)
        async for at, guest in self._all():
            self._check_entries(at, guest, first)
            tally.data_blocks += int(np.count_nonzero(guest < self._layout.footer.current_size))
        tally.metadata_bytes += tally.data_blocks * header.bitmap
        end = self._layout.footer_at
        if not tally.data_blocks:
            self._last_end = first
        # Writers may align the first block or the footer; a whole block that nobody uses is a leak.
        if end - self._last_end >= vhd.SECTOR and self._last_end <= end:
            tally.leak(f"{end - self._last_end} bytes in front of the footer belong to no block", self._last_end)
        await find_overlaps(self._valid, self._stride, self._reader.size, tally)
        if deep:
            await self._check_bitmaps()

    def _check_entries(self, at: NDArray[np.int64], guest: NDArray[np.int64], first: int) -> None:
        if not at.size:
            return
        end = self._layout.footer_at
        self._note(at < first, "a block lies inside header or block table", at, guest)
        self._note(at + self._stride > end, "a block reaches behind the footer", at, guest)
        beyond = guest >= self._layout.footer.current_size
        if beyond.any():
            index = int(np.flatnonzero(beyond)[0])
            self._tally.warning(
                "blocks behind the end of the disk are stored", int(at[index]), count=int(np.count_nonzero(beyond))
            )
        self._last_end = max(self._last_end, int(at.max()) + self._stride)

    def _note(self, wrong: NDArray[np.bool_], message: str, at: NDArray[np.int64], guest: NDArray[np.int64]) -> None:
        found = np.flatnonzero(wrong)
        for index in found[:_TOLD].tolist():
            self._tally.corruption(message, int(at[index]), int(guest[index]))
        self._tally.count_more_corruptions(max(0, found.size - _TOLD))

    async def _all(self) -> AsyncIterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """(image offset of the bitmap, guest offset) of every block that has an entry."""
        header = self._header
        for start in range(0, header.entries * 4, _TABLE_STEP):
            length = min(_TABLE_STEP, header.entries * 4 - start)
            sectors = np.frombuffer(await self._reader.read(header.table_offset + start, length), ">u4").astype(
                np.int64
            )
            used = np.flatnonzero(sectors != vhd.ABSENT)
            yield sectors[used] * vhd.SECTOR, (used + start // 4) * header.block_size

    async def _valid(self) -> AsyncIterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        async for at, guest in self._all():
            inside = at + self._stride <= self._reader.size
            yield at[inside], guest[inside]

    async def _check_bitmaps(self) -> None:
        """A sector that its bitmap calls unused reads as zero in some readers: it had better be zero."""
        header = self._header
        size = self._layout.footer.current_size
        async for at, guest in self._valid():
            for where, offset in zip(at.tolist(), guest.tolist(), strict=True):
                bitmap = await self._reader.read(where, header.bitmap)
                sectors = min(header.block_size, max(0, size - offset)) // vhd.SECTOR
                if vhd.marks_all(bitmap, sectors):
                    continue
                bits = np.unpackbits(np.frombuffer(bitmap, np.uint8))[:sectors]
                for start in range(0, sectors, MiB // vhd.SECTOR):
                    some = bits[start : start + MiB // vhd.SECTOR]
                    raw = await self._reader.read(where + header.bitmap + start * vhd.SECTOR, some.size * vhd.SECTOR)
                    data = np.frombuffer(raw, np.uint8).reshape(some.size, vhd.SECTOR)
                    if ((some == 0) & data.any(axis=1)).any():
                        self._tally.warning(
                            "the bitmap of a block calls sectors unused that hold data; some readers see zeros there",
                            where,
                            offset,
                        )
                        break
