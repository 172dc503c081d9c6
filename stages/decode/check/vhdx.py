"""Check a VHDX image: header copies, regions, metadata, the block table, overlaps.

Source: Microsoft [MS-VHDX], "Header Section", "Region Table", "Block Allocation Table (BAT)".
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import numpy as np

from pipeline.errors import FormatError
from pipeline.flow.items import RangeReader
from pipeline.units import MiB
from stages.decode import vhdx
from stages.decode.check.blocks import find_overlaps, read_everything
from stages.decode.check.report import ImageInfo, Tally
from stages.decode.refusal import UnsupportedError

if TYPE_CHECKING:
    from numpy.typing import NDArray

_TABLE_STEP = MiB
_TOLD = 8


async def check_vhdx(reader: RangeReader, *, deep: bool, strict: bool) -> Tally:
    """Check an image. As `checking.check`."""
    tally = Tally("vhdx")
    try:
        layout = await vhdx.read_layout(reader)
        tally.info = _info(layout, reader.size)
        for reason in layout.damaged:
            tally.corruption(reason)
        await _Blocks(reader, layout, tally).run()
        if deep:
            await read_everything(await vhdx.open_vhdx(reader), layout.block_size, tally)
        if strict:
            await vhdx.open_vhdx(reader, strict=True)
    except UnsupportedError:
        raise
    except FormatError as error:
        tally.stop(error)
    return tally


async def vhdx_info(reader: RangeReader) -> ImageInfo:
    """What headers and metadata say."""
    return _info(await vhdx.read_layout(reader), reader.size)


def _info(layout: vhdx.Layout, file_size: int) -> ImageInfo:
    return ImageInfo(
        format="vhdx",
        variant="fixed" if layout.keeps_blocks else "dynamic",
        virtual_size=layout.size,
        file_size=file_size,
        block_size=layout.block_size,
        identity=str(layout.disk_id),
        details=(
            ("creator", layout.creator[:64]),
            ("logical sector", str(layout.logical_sector)),
            ("physical sector", str(layout.physical_sector)),
            ("sequence", str(layout.sequence)),
        ),
    )


class _Blocks:
    """Regions and blocks."""

    def __init__(self, reader: RangeReader, layout: vhdx.Layout, tally: Tally) -> None:
        self._reader = reader
        self._layout = layout
        self._tally = tally
        self._first, self._end = reader.size, 0
        self._regions = (
            (0, MiB, "header section"),
            (layout.log.offset, layout.log.length, "log"),
            (layout.bat.offset, layout.bat.length, "block table"),
            (layout.metadata.offset, layout.metadata.length, "metadata"),
        )

    async def run(self) -> None:
        """Check regions against each other and every entry of the block table."""
        layout, tally = self._layout, self._tally
        for number, (start, length, name) in enumerate(self._regions):
            for other, more, its_name in self._regions[:number]:
                if start < other + more and other < start + length:
                    tally.corruption(f"{its_name} and {name} overlap", start)
        tally.blocks = layout.blocks
        tally.metadata_bytes = sum(length for _, length, _ in self._regions)
        async for index, entries in self._entries():
            self._check_entries(index, entries)
        await find_overlaps(self._places, layout.block_size, self._reader.size, tally)
        self._check_leaks()

    def _check_leaks(self) -> None:
        """Space between and behind the blocks. What lies in front of the first is the writer's alignment."""
        layout, tally = self._layout, self._tally
        tables_end = max(start + length for start, length, _ in self._regions)
        end = max(self._end, tables_end)
        between = self._end - self._first - tally.data_blocks * layout.block_size if tally.data_blocks else 0
        inside = sum(length for start, length, _ in self._regions if self._first < start < self._end)
        lost = max(0, between - inside) + max(0, self._reader.size - end)
        if not tally.report(deep=False).corruptions and lost >= layout.block_size:
            tally.leak(f"{lost} bytes belong to no block and no table", end, blocks=lost // layout.block_size)

    def _check_entries(self, index: NDArray[np.int64], entries: NDArray[np.uint64]) -> None:
        layout, tally = self._layout, self._tally
        state = (entries & np.uint64(vhdx.STATE_MASK)).astype(np.int64)
        at = (entries >> np.uint64(20)).astype(np.int64) << 20
        guest = self._guest(index)
        is_bitmap = index % (layout.chunk_ratio + 1) == layout.chunk_ratio
        where = layout.bat.offset + index * 8
        reserved = (entries & np.uint64(vhdx.RESERVED_MASK)) != 0
        self._note(reserved, "reserved bits are set in the block table", where, guest)
        self._note(~is_bitmap & ((state == 4) | (state == 5)), "a block has a state that does not exist", where, guest)
        partial = ~is_bitmap & (state == vhdx.PARTIALLY_PRESENT)
        self._note(partial, "a block is partly in a parent, and there is none", where, guest)
        if (is_bitmap & (state != 0)).any():
            tally.warning(
                "sector bitmaps are stored for a disk without a parent", int(where[is_bitmap & (state != 0)][0])
            )
        stored = ~is_bitmap & (state == vhdx.FULLY_PRESENT)
        wanted = np.minimum(layout.block_size, layout.size - guest)
        outside = stored & ((at + wanted > self._reader.size) | (at < 0))
        self._note(outside, "a block lies behind the end of the image", at, guest)
        for start, length, name in self._regions:
            inside = stored & (at < start + length) & (at + layout.block_size > start)
            self._note(inside, f"a block lies inside the {name}", at, guest)
        if stored.any():
            self._first = min(self._first, int(at[stored].min()))
            self._end = max(self._end, int(at[stored].max()) + layout.block_size)
        tally.data_blocks += int(np.count_nonzero(stored))
        tally.zero_blocks += int(np.count_nonzero(~is_bitmap & (state == vhdx.ZERO)))

    def _guest(self, index: NDArray[np.int64]) -> NDArray[np.int64]:
        chunk, place = np.divmod(index, self._layout.chunk_ratio + 1)
        return (chunk * self._layout.chunk_ratio + place) * self._layout.block_size

    async def _entries(self) -> AsyncIterator[tuple[NDArray[np.int64], NDArray[np.uint64]]]:
        """(index, value) of every entry that is not 0 and concerns the disk."""
        layout = self._layout
        for start in range(0, layout.entries * 8, _TABLE_STEP):
            length = min(_TABLE_STEP, layout.entries * 8 - start)
            entries = np.frombuffer(await self._reader.read(layout.bat.offset + start, length), "<u8").astype(np.uint64)
            used = np.flatnonzero(entries)
            yield used + start // 8, entries[used]

    async def _places(self) -> AsyncIterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        async for index, entries in self._entries():
            at = (entries >> np.uint64(20)).astype(np.int64) << 20
            is_payload = index % (self._layout.chunk_ratio + 1) != self._layout.chunk_ratio
            stored = is_payload & (entries & np.uint64(vhdx.STATE_MASK) == vhdx.FULLY_PRESENT)
            stored &= (at >= 0) & (at <= self._reader.size)
            yield at[stored], self._guest(index[stored])

    def _note(self, wrong: NDArray[np.bool_], message: str, at: NDArray[np.int64], guest: NDArray[np.int64]) -> None:
        found = np.flatnonzero(wrong)
        for index in found[:_TOLD].tolist():
            self._tally.corruption(message, int(at[index]), int(guest[index]))
        self._tally.count_more_corruptions(max(0, found.size - _TOLD))
