"""Check a VMDK image: header and footer, descriptor, both grain directories, overlaps, and (deep) every grain.

Source: VMware, Virtual Disk Format 5.0, "Hosted Sparse Extents", "Stream-Optimized Compressed Sparse Extents".
"""

from __future__ import annotations

import struct
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import numpy as np

from pipeline.errors import FormatError
from pipeline.flow.items import RangeReader
from pipeline.units import round_up
from stages.decode import vmdk
from stages.decode.check.blocks import find_overlaps, read_everything
from stages.decode.check.report import ImageInfo, Tally
from stages.decode.refusal import UnsupportedError

if TYPE_CHECKING:
    from numpy.typing import NDArray

_TOLD = 8
# The directory is read in pieces of so many entries: 64 KiB, 512 GiB of disk with grains of 64 KiB.
_DIRECTORY_STEP = 16384


async def check_vmdk(reader: RangeReader, *, deep: bool, strict: bool, extents: vmdk.Extents | None = None) -> Tally:
    """Check an image. As `checking.check`."""
    tally = Tally("vmdk")
    try:
        image = await vmdk.open_vmdk(reader, extents=extents)
        tally.info = _info(image, reader.size)
        if isinstance(image, vmdk.VmdkImage):
            _check_descriptor(image, tally)
            await _Sparse(reader, image, tally).run()
        else:
            tally.metadata_bytes = reader.size
            for base, part in image.parts:
                one = Tally("vmdk")
                if isinstance(part, vmdk.SparseExtent):
                    await _Sparse(part.reader, part, one).run()
                tally.adopt(one, guest_base=base)
        if deep:
            await read_everything(image, _grain(image), tally)
        if strict:
            await vmdk.open_vmdk(reader, strict=True, extents=extents)
    except UnsupportedError:
        raise
    except FormatError as error:
        tally.stop(error)
    return tally


async def vmdk_info(reader: RangeReader, extents: vmdk.Extents | None = None) -> ImageInfo:
    """What header and descriptor say."""
    return _info(await vmdk.open_vmdk(reader, extents=extents), reader.size)


def _grain(image: vmdk.VmdkImage | vmdk.JoinedVmdk) -> int:
    return image.header.grain if isinstance(image, vmdk.VmdkImage) else 64 * 1024


def _info(image: vmdk.VmdkImage | vmdk.JoinedVmdk, file_size: int) -> ImageInfo:
    descriptor = image.descriptor
    values = dict(descriptor.values)
    names = ("ddb.adaptertype", "ddb.virtualhwversion", "ddb.uuid")
    details = tuple((name.removeprefix("ddb."), values[name]) for name in names if name in values)
    flags: tuple[str, ...] = ()
    compression = "none"
    if isinstance(image, vmdk.VmdkImage):
        header = image.header
        known = (
            ("zeroed grains", header.flags & vmdk.ZEROED_GRAINS),
            ("markers", header.flags & vmdk.MARKERS),
            ("redundant directory", header.flags & vmdk.SECOND_DIRECTORY),
            ("unclean shutdown", header.is_unclean),
        )
        flags = tuple(name for name, is_set in known if is_set)
        compression = "deflate" if header.is_compressed else "none"
        details += (("header version", str(header.version)),)
    else:
        details += (("extents", ", ".join(f"{one.kind} {one.size}" for one in descriptor.extents[:64])),)
    return ImageInfo(
        format="vmdk",
        variant=descriptor.create_type,
        virtual_size=image.size,
        file_size=file_size,
        block_size=_grain(image) if isinstance(image, vmdk.VmdkImage) else 0,
        compression=compression,
        flags=flags,
        identity=descriptor.content_id,
        details=details,
    )


def _check_descriptor(image: vmdk.VmdkImage, tally: Tally) -> None:
    descriptor, header = image.descriptor, image.header
    if descriptor.unknown_lines:
        tally.warning(f"the descriptor has {descriptor.unknown_lines} lines that importers refuse", header.descriptor)
    if "/" in descriptor.extents[0].name or "\\" in descriptor.extents[0].name:
        tally.warning("the descriptor names a folder, which importers refuse", header.descriptor)
    if header.descriptor != vmdk.SECTOR:
        tally.warning("the descriptor is not at byte 512, where importers look for it", 28)
    is_stream = descriptor.create_type == "streamOptimized"
    if is_stream != header.is_compressed:
        tally.corruption(f"the descriptor says {descriptor.create_type}, the header's flags say another subformat", 8)
    if is_stream and header.version != 3:
        tally.warning("ESXi takes streamOptimized disks of version 3 only", 4)


class _Sparse:
    """One sparse extent."""

    def __init__(self, reader: RangeReader, image: vmdk.SparseExtent, tally: Tally) -> None:
        self._reader = reader
        self._image = image
        self._header = image.header
        self._tally = tally
        # With markers between grains and tables; QEMU writes streamOptimized disks without.
        self._is_stream = image.header.at > 0
        self._unit = vmdk.SECTOR if image.header.is_compressed else image.header.grain
        self._last = -1
        self._end = 0
        self._told_order = False

    async def run(self) -> None:
        """Check directories, tables and the places of all grains."""
        header, tally = self._header, self._tally
        for warning in self._image.warnings:
            tally.warning(warning, 72)
        tally.blocks = header.grains
        directory = header.directory or 0
        directory_end = directory + round_up(header.tables * 4, vmdk.SECTOR)
        tally.metadata_bytes = vmdk.HEADER + header.descriptor_bytes + directory_end - directory
        if header.descriptor < directory_end and directory < header.descriptor + header.descriptor_bytes:
            tally.corruption("descriptor and grain directory overlap", directory)
        seen = [
            (directory, directory_end, "grain directory"),
            (header.descriptor, header.descriptor + header.descriptor_bytes, "descriptor"),
        ]
        await self._check_marker(directory, vmdk.DIRECTORY_MARKER, -(-header.tables * 4 // vmdk.SECTOR))
        tables = 0
        async for at, guest in self._tables():
            tables += at.size
            for start, end, name in seen:
                inside = (at < end) & (at + vmdk.TABLE > start)
                self._note(inside, f"a grain table lies inside the {name}", at, guest)
        tally.metadata_bytes += tables * vmdk.TABLE
        if tables * vmdk.TABLE > self._reader.size:
            tally.corruption("the directory names more grain tables than the file holds: they overlap", directory)
            tally.is_complete = False
            return
        await find_overlaps(self._tables, vmdk.TABLE, self._reader.size, tally)
        async for at, guest in self._grains():
            self._check_grains(at, guest, seen)
        await find_overlaps(self._inside, self._unit, self._reader.size, tally)
        await self._check_against_tables()
        if header.second:
            await self._compare_directories()
        if not header.is_compressed and self._end:
            left = self._reader.size - self._end
            if left >= header.grain:
                tally.leak(f"{left} bytes behind the last grain belong to none", self._end, blocks=left // header.grain)

    async def _tables(self) -> AsyncIterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """(image offset, guest offset) of the grain tables."""
        header = self._header
        span = header.grain * vmdk.TABLE_ENTRIES
        for first in range(0, header.tables, _DIRECTORY_STEP):
            last = min(first + _DIRECTORY_STEP, header.tables)
            found = [pair async for pair in self._image.tables(first, last)]
            at = np.array([offset for _, offset in found], np.int64)
            yield at, np.array([index for index, _ in found], np.int64) * span

    async def _grains(self) -> AsyncIterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """(image offset, guest offset) of the grains that are stored, table by table."""
        header = self._header
        zeroed = vmdk.ZEROED if header.flags & vmdk.ZEROED_GRAINS else 0
        room = self._reader.size
        async for tables, guests in self._tables():
            for at, guest in zip(tables.tolist(), guests.tolist(), strict=True):
                room -= vmdk.TABLE
                if room < 0:
                    return  # the tables overlap, which is noted; they would be read again and again
                raw = await self._image.table(at)
                sectors = np.frombuffer(raw, "<u4").astype(np.int64)
                used = np.flatnonzero(sectors > zeroed)
                yield sectors[used] * vmdk.SECTOR, guest + used * header.grain

    async def _inside(self) -> AsyncIterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        async for at, guest in self._grains():
            good = at + self._unit <= self._reader.size
            yield at[good], guest[good]

    def _check_grains(self, at: NDArray[np.int64], guest: NDArray[np.int64], seen: list[tuple[int, int, str]]) -> None:
        if not at.size:
            return
        header, tally = self._header, self._tally
        first = header.overhead if not header.is_compressed else vmdk.HEADER + header.descriptor_bytes
        self._note(at < max(first, vmdk.HEADER), "a grain lies in front of the data area", at, guest)
        wanted = self._unit if header.is_compressed else np.minimum(header.grain, self._image.size - guest)
        self._note(at + wanted > self._reader.size, "a grain lies behind the end of the image", at, guest)
        for start, end, name in seen:
            self._note((at < end) & (at + self._unit > start), f"a grain lies inside the {name}", at, guest)
        beyond = guest >= round_up(header.capacity, header.grain)
        if beyond.any():
            tally.warning("grains behind the end of the disk are stored", int(at[beyond][0]))
        if self._is_stream and not self._told_order and (np.diff(at, prepend=self._last) <= 0).any():
            self._told_order = True
            tally.warning("grains are not stored in the order of the disk; VMware's tools rewrite such an image")
        self._last = int(at[-1])
        self._end = max(self._end, int(at.max()) + header.grain)
        if header.is_compressed:
            tally.packed_blocks += at.size
        else:
            tally.data_blocks += at.size

    async def _check_against_tables(self) -> None:
        """Grains and grain tables may not share bytes."""
        tables = [at async for at, _ in self._tables()]
        starts = np.sort(np.concatenate(tables)) if tables else np.zeros(0, np.int64)
        if not starts.size:
            return
        if self._is_stream:
            for at in starts.tolist():
                await self._check_marker(at, vmdk.TABLE_MARKER, vmdk.TABLE // vmdk.SECTOR)
        async for at, guest in self._grains():
            following = np.searchsorted(starts, at + self._unit)  # tables that begin before the grain ends
            before = starts[np.maximum(following - 1, 0)]
            self._note((following > 0) & (before + vmdk.TABLE > at), "a grain lies inside a grain table", at, guest)

    async def _check_marker(self, at: int, kind: int, sectors: int) -> None:
        if not self._is_stream:
            return
        raw = await self._reader.read(at - vmdk.SECTOR, 16) if at >= vmdk.SECTOR else bytes(16)
        if struct.unpack("<QII", raw) != (sectors, 0, kind):
            self._tally.corruption("a table has no proper marker in front of it", at - vmdk.SECTOR)

    async def _compare_directories(self) -> None:
        """The redundant directory and its tables must say the same as the first."""
        header, tally = self._header, self._tally
        if header.second + header.tables * 4 > self._reader.size:
            tally.corruption("the redundant directory lies behind the end of the image", 48)
            return
        room = self._reader.size
        for first in range(0, header.tables, _DIRECTORY_STEP):
            count = min(_DIRECTORY_STEP, header.tables - first)
            ours = await self._directory(header.directory or 0, first, count)
            other = await self._directory(header.second, first, count)
            for number, (one, two) in enumerate(zip(ours.tolist(), other.tolist(), strict=True), first):
                room -= 2 * vmdk.TABLE
                if bool(one) != bool(two) or two * vmdk.SECTOR + vmdk.TABLE > self._reader.size:
                    tally.corruption("the redundant directory differs", header.second + number * 4)
                elif one and one != two and room >= 0:
                    left = await self._reader.read(one * vmdk.SECTOR, vmdk.TABLE)
                    right = await self._reader.read(two * vmdk.SECTOR, vmdk.TABLE)
                    if left != right:
                        tally.corruption("a grain table and its redundant copy differ", two * vmdk.SECTOR)

    async def _directory(self, at: int, first: int, count: int) -> NDArray[np.int64]:
        return np.frombuffer(await self._reader.read(at + first * 4, count * 4), "<u4").astype(np.int64)

    def _note(self, wrong: NDArray[np.bool_], message: str, at: NDArray[np.int64], guest: NDArray[np.int64]) -> None:
        found = np.flatnonzero(wrong)
        for index in found[:_TOLD].tolist():
            self._tally.corruption(message, int(at[index]), int(guest[index]))
        self._tally.count_more_corruptions(max(0, found.size - _TOLD))
