"""The streamOptimized VMDK: compressed grains in guest order, each table right behind its grains, nothing patched.

    0     header | descriptor | free up to the first grain
          grains ... | table        for every 32 MiB that hold data
          directory | footer | end

Source: VMware Virtual Disk Format 5.0, "Stream-Optimized Compressed Sparse Extents".
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from pipeline.errors import StageError
from pipeline.flow.buffers import Charge, Slice, charged_slice, loose_slice
from pipeline.flow.items import Block, Piece
from pipeline.flow.stage import StageContext
from pipeline.units import round_up
from stages.encode.birth import Birth
from stages.encode.checkpoints import identify, pack_state, unpack_state
from stages.encode.codecs import Codec, Level
from stages.encode.cursor import Cursor
from stages.encode.grains import touched_grains
from stages.encode.vmdk_structures import (
    GRAIN,
    GRAIN_HEADER,
    GRAIN_SECTORS,
    IMAGE_MAX,
    MARK_DIRECTORY,
    MARK_END,
    MARK_FOOTER,
    MARK_TABLE,
    SECTOR,
    TABLE_ENTRIES,
    TABLE_LENGTH,
    TABLE_REACH,
    TABLE_SECTORS,
    Adapter,
    descriptor,
    header,
    marker,
)

FRONT = GRAIN_SECTORS * SECTOR
# A grain with its header and pad: VMware's reader takes no more, and no codec here makes more of noise.
RECORD_MAX = 129 * SECTOR

_ENTRY = struct.Struct("<I")
_PADS = tuple(bytes(length) for length in range(SECTOR))


@dataclass(frozen=True, slots=True)
class Grains:
    """The compressed grains of a block, as they will stand in the image. Owns `data`.

    Attributes:
        numbers: of the grains on the disk, ascending.
        sectors: how many each takes in the image.
    """

    offset: int
    length: int
    data: Slice | None = None
    numbers: Sequence[int] = ()
    sectors: Sequence[int] = ()


class StreamOptimizedEncoder:
    """Compress grains and append them with the tables that describe them.

    Attributes:
        stored_grains: how many were placed.
    """

    def __init__(
        self, context: StageContext, *, size: int, level: Level, adapter: Adapter, birth: Birth, name: str
    ) -> None:
        """
        Args:
            size: of the virtual disk, in bytes; a multiple of the grain.
            name: of the extent.
        """
        from stages.encode.codecs import zlib_stream

        self._codec: Codec = zlib_stream(level)
        self._capacity = size // SECTOR
        self._adapter: Adapter = adapter
        self._birth = birth
        self._name = name
        self._disk_size = context.disk_size
        self._window = context.window
        self._identity = ""
        self._cursor = Cursor(0, context.disk_size)
        self._directory = array("I", bytes(4 * -(-size // TABLE_REACH)))
        self._table = bytearray(TABLE_LENGTH)
        self._table_number = 0
        self._table_grains = 0  # how many the open table has
        self.stored_grains = 0

    @property
    def position(self) -> int:
        """Image offset behind the last byte placed."""
        return self._cursor.position

    @property
    def identity(self) -> str:
        """A digest of all that shapes the image besides the disk."""
        if not self._identity:
            self._identity = identify(
                encoder="vmdk stream 1",
                codec=self._codec.identity(),
                adapter=self._adapter,
                name=self._name,
                disk_size=self._disk_size,
                window=self._window,
                birth=self._birth.shape,
            )
        return self._identity

    def prepare(self, block: Block, charge: Charge | None) -> Grains:
        """Compress the grains of a block that any data run touches, all in one go.

        Takes over the block's slice, which is given back once its grains are made. Besides `charge`, the streams of
        one window exist twice for the moment in which they are joined.

        Threads: any, several at once; keeps no state.
        """
        source = block.data
        try:
            ranges = touched_grains(block.runs, block.offset, GRAIN) if source is not None else []
            if source is None or not ranges:
                if charge is not None:
                    charge.release()
                return Grains(block.offset, block.length)
            return self._compress(block, source.view, ranges, charge)
        except BaseException:
            if charge is not None:
                charge.release()
            raise
        finally:
            if source is not None:
                source.release()

    def _compress(self, block: Block, view: memoryview, ranges: list[tuple[int, int]], charge: Charge | None) -> Grains:
        compress = self._codec.compress
        base = block.offset // GRAIN
        numbers: list[int] = []
        sectors: list[int] = []
        parts: list[bytes] = []
        for first, stop in ranges:
            for number in range(first, stop):
                grain: bytes | memoryview = view[number * GRAIN : (number + 1) * GRAIN]
                if len(grain) < GRAIN:
                    grain = bytes(grain).ljust(GRAIN, b"\0")
                stream = compress(grain)
                length = GRAIN_HEADER.size + len(stream)
                parts += (
                    GRAIN_HEADER.pack((base + number) * GRAIN_SECTORS, len(stream)),
                    stream,
                    _PADS[-length % SECTOR],
                )
                numbers.append(base + number)
                sectors.append(-(-length // SECTOR))
        made = b"".join(parts)
        data = charged_slice(made, charge) if charge is not None else loose_slice(made)
        return Grains(block.offset, block.length, data, numbers, sectors)

    def place(self, prepared: Grains) -> list[Piece]:
        """Append a block's grains, and before them the table that they don't belong to. The caller owns the pieces.

        Raises:
            StageError: the blocks don't come in guest order, or the image grew beyond what its tables can address.
        """
        placed: list[Piece] = []
        try:
            self._cursor.enter(prepared.offset)
            if self._cursor.position == 0:
                placed.append(self._cursor.put(self._front(), FRONT))
            if prepared.data is not None:
                self._place_grains(prepared, prepared.data, placed)
        finally:
            if prepared.data is not None:
                prepared.data.release()
        return self._cursor.leave(prepared.length, placed)

    def _place_grains(self, prepared: Grains, data: Slice, placed: list[Piece]) -> None:
        start = 0
        members = zip(prepared.numbers, prepared.sectors, strict=True)
        for table, grains in groupby(members, lambda member: member[0] // TABLE_ENTRIES):
            if table != self._table_number:
                placed += self._close_table()
                self._table_number = table
            sector = first = self._cursor.position // SECTOR
            for number, length in grains:
                _ENTRY.pack_into(self._table, 4 * (number % TABLE_ENTRIES), sector & 0xFFFFFFFF)
                sector += length
                self._table_grains += 1
                self.stored_grains += 1
            stop = start + (sector - first) * SECTOR
            self._check_room(stop - start)
            placed.append(self._cursor.put(data.share(start, stop), stop - start))
            start = stop

    def _close_table(self) -> Iterator[Piece]:
        """Write the open table, if it has entries."""
        if self._table_grains:
            block = marker(MARK_TABLE, TABLE_SECTORS) + self._table
            self._check_room(len(block))
            self._directory[self._table_number] = self._cursor.position // SECTOR + 1
            self._table = bytearray(TABLE_LENGTH)
            self._table_grains = 0
            yield self._cursor.put(block, len(block))

    def _check_room(self, length: int) -> None:
        if self._cursor.position + length > IMAGE_MAX:
            raise StageError(
                "the image has grown to 2 TiB, and the tables of a VMDK point no further",
                operation="place",
                offset=self._cursor.position,
                guest_offset=self._cursor.guest,
                hint="Write encode.qcow2, encode.vhdx or encode.raw; or export less of the disk.",
            )

    def _front(self) -> bytes:
        text = descriptor("streamOptimized", self._capacity, name=self._name, adapter=self._adapter, birth=self._birth)
        return (header("streamOptimized", self._capacity) + text).ljust(FRONT, b"\0")

    def finish(self) -> Iterator[Piece]:
        """The last table, the directory, the footer.

        Raises:
            StageError: the blocks ended before the disk.
        """
        self._cursor.check_end()
        for piece in self._close_table():
            yield self._cursor.settle(piece)
        length = round_up(4 * len(self._directory), SECTOR)
        directory_sector = self._cursor.position // SECTOR + 1
        end = (
            marker(MARK_DIRECTORY, length // SECTOR)
            + struct.pack(f"<{len(self._directory)}I", *self._directory).ljust(length, b"\0")
            + marker(MARK_FOOTER, 1)
            + header("streamOptimized", self._capacity, directory=directory_sector)
            + marker(MARK_END, 0)
        )
        yield self._cursor.settle(self._cursor.put(end, len(end)))

    def checkpoint(self) -> bytes:
        """All of the state: positions, the directory so far, the open table. Compressed."""
        known = -(-self._cursor.guest // TABLE_REACH)
        note = {
            "cursor": self._cursor.dump(),
            "table": [self._table_number, self._table_grains, self.stored_grains],
            "birth": self._birth.dump(),
        }
        directory = struct.pack(f"<{known}I", *self._directory[:known])
        return pack_state(self.identity, note, [directory, bytes(self._table)])

    def restore(self, state: bytes) -> None:
        """Go back to a checkpoint.

        Raises:
            PlanError: it is damaged, or was made with other options, for another disk, or by a codec that gives
                other bytes.
        """
        note, (directory, table) = unpack_state(self.identity, state)
        self._cursor.load(note["cursor"])
        self._table_number, self._table_grains, self.stored_grains = note["table"]
        self._birth = self._birth.load(note["birth"])
        known = struct.unpack(f"<{len(directory) // 4}I", directory)
        self._directory = array("I", known) + array("I", bytes(4 * (len(self._directory) - len(known))))
        self._table = bytearray(table)


def longest_stream(size: int) -> int:
    """Bytes of the image of a disk of `size` whose every grain is noise; the encoder never passes IMAGE_MAX much."""
    grains = -(-size // GRAIN)
    tables = -(-size // TABLE_REACH)
    data = FRONT + grains * RECORD_MAX + tables * (SECTOR + TABLE_LENGTH)
    return min(data, IMAGE_MAX) + SECTOR + round_up(4 * tables, SECTOR) + 3 * SECTOR
