"""Plain qcow2 from its first byte to its last, for targets that can't go back: all tables, then the clusters.

    header | refcount table | refcount blocks | L1 | L2 tables | clusters with data, in guest order

It needs to know which clusters hold data before the first byte: the map pass. A cluster that was mapped and reads as
zero now is written as zeros; one that was not and holds data now fails the run, for there is no place for it. The last
cluster of the disk is always stored, so that the last guest bytes have a piece to travel with.

Source: QCOW2 image format, "Header", "Host cluster management", "Cluster mapping".
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.errors import SourceError, StageError
from pipeline.flow.buffers import Charge, Slice
from pipeline.flow.items import Block, Piece
from pipeline.flow.mapping import DataMap
from pipeline.flow.stage import StageContext
from pipeline.units import MiB, round_up
from stages.encode.checkpoints import identify, pack_state, unpack_state
from stages.encode.qcow2_geometry import Geometry
from stages.encode.qcow2_header import pack_header

if TYPE_CHECKING:
    import numpy

_COPIED = 1 << 63
_STRETCH = 1 * MiB


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """Where everything lies in the image. Offsets and lengths are bytes of the image.

    Attributes:
        tables: L2 tables that are not empty.
        stored: clusters with data.
    """

    refcount_table: int
    refcount_blocks: int
    l1: int
    l2: int
    data: int
    end: int
    tables: int
    stored: int


def plan_places(geometry: Geometry, found: DataMap) -> Places:
    """Lay the image out."""
    size = geometry.cluster_size
    stored = found.count()
    tables = sum(1 for _ in _tables(geometry, found))
    l1_clusters = round_up(8 * geometry.l1_entries, size) // size
    used = 1 + l1_clusters + tables + stored
    blocks, table = geometry.close(used, 0)
    refcount_blocks = (1 + table) * size
    l1 = refcount_blocks + blocks * size
    l2 = l1 + l1_clusters * size
    data = l2 + tables * size
    return Places(
        refcount_table=size,
        refcount_blocks=refcount_blocks,
        l1=l1,
        l2=l2,
        data=data,
        end=data + stored * size,
        tables=tables,
        stored=stored,
    )


def complete_map(found: DataMap) -> DataMap:
    """The map with the last cluster marked."""
    found.add(found.size - 1, found.size)
    return found


@dataclass(frozen=True, slots=True)
class Mapped:
    """A block, and the (start, stop) stretches of its clusters that are stored, in bytes. Owns `data`."""

    offset: int
    length: int
    data: Slice | None = None
    stretches: Sequence[tuple[int, int]] = ()


class MappedQcow2Encoder:
    """Write the tables that a map tells, then append the clusters that it names."""

    def __init__(self, geometry: Geometry, context: StageContext) -> None:
        assert context.layout is not None, "the planning made a map and a layout of it"
        assert context.layout.map is not None, "the planning made a map and a layout of it"
        self._geometry = geometry
        self._map = context.layout.map
        self._cluster = geometry.cluster_size
        self._disk_size = context.disk_size
        self._window = context.window
        self._places = plan_places(geometry, self._map)
        self._position = 0
        self._guest = 0
        self._carried = 0
        self._identity = ""

    @property
    def position(self) -> int:
        """Image offset behind the last byte placed."""
        return self._position

    @property
    def identity(self) -> str:
        """A digest of all that shapes the image besides the disk: geometry, window and the map."""
        if not self._identity:
            self._identity = identify(
                encoder="qcow2 mapped 1",
                cluster_size=self._cluster,
                refcount_bits=self._geometry.refcount_bits,
                disk_size=self._disk_size,
                window=self._window,
                map=self._map.identity,
            )
        return self._identity

    def prepare(self, block: Block, charge: Charge | None) -> Mapped:
        """Find the clusters that are stored. Threads: any; keeps the block's slice, gives `charge` back.

        Raises:
            SourceError: a cluster that the map called zero holds data.
        """
        if charge is not None:
            charge.release()
        size = self._cluster
        first, stop = block.offset // size, -(-block.end // size)
        stretches = [
            (low * size - block.offset, min(high * size, block.end) - block.offset)
            for low, high in self._map.stretches(first, stop)
        ]
        if block.data is not None:
            try:
                self._check_others(block, block.data.view, stretches)
            except BaseException:
                block.data.release()
                raise
            if not stretches:
                block.data.release()
                return Mapped(block.offset, block.length)
        return Mapped(block.offset, block.length, block.data, stretches)

    def _check_others(self, block: Block, view: memoryview, stretches: Sequence[tuple[int, int]]) -> None:
        """What is not stored has to be zero, wherever a data run says that it was read."""
        import numpy

        edges = [0, *(edge for stretch in stretches for edge in stretch), block.length]
        for low, high in zip(edges[::2], edges[1::2], strict=True):
            for run in block.runs:
                start, stop = max(low, run.offset - block.offset), min(high, run.end - block.offset)
                if not run.is_data or start >= stop:
                    continue
                flags = numpy.frombuffer(view[start:stop], numpy.bool_)
                if flags.any():
                    raise SourceError(
                        "the disk holds data where the map pass found zeros",
                        operation="encode",
                        offset=block.offset + start + int(flags.argmax()),
                        hint="The disk changed between the two passes. Export a snapshot, or stop what writes to it; "
                        "write.file and write.s3 need no map pass.",
                    )

    def place(self, prepared: Mapped) -> Iterator[Piece]:
        """All tables before the first block; then the stored clusters of each.

        Raises:
            StageError: the blocks don't come in guest order.
        """
        data = prepared.data
        if prepared.offset != self._guest:
            if data is not None:
                data.release()
            raise StageError(
                "the blocks of the disk do not come in order",
                operation="place",
                expected=self._guest,
                offset=prepared.offset,
            )
        return self._place(prepared, data)

    def _place(self, prepared: Mapped, data: Slice | None) -> Iterator[Piece]:
        try:
            if not self._position:
                for table in self._tables_bytes():
                    yield self._put(table, len(table), 0)
            done = prepared.offset
            for start, stop in prepared.stretches:
                guest = prepared.offset + stop - done + self._carried
                done, self._carried = prepared.offset + stop, 0
                part = data.share(start, stop) if data is not None else None
                pad = -(prepared.offset + stop) % self._cluster
                yield self._put(part, stop - start, guest)
                if pad:  # the last cluster of a disk that ends inside it
                    yield self._put(None, pad, 0)
            self._carried += prepared.offset + prepared.length - done
            self._guest = prepared.offset + prepared.length
        finally:
            if data is not None:
                data.release()

    def finish(self) -> Iterator[Piece]:
        """Nothing follows.

        Raises:
            StageError: the blocks ended before the disk, or the image is not what the map said.
        """
        if self._guest != self._disk_size or self._position != self._places.end:
            raise StageError(
                "the blocks do not end with the disk",
                operation="finish",
                expected=self._disk_size,
                got=self._guest,
                position=self._position,
            )
        return iter(())

    def checkpoint(self) -> bytes:
        """The positions; the map belongs to the plan, and only its digest is here."""
        return pack_state(self.identity, {"at": [self._position, self._guest, self._carried]})

    def restore(self, state: bytes) -> None:
        """Go back to a checkpoint.

        Raises:
            PlanError: it is damaged, or was made with other options, for another disk or after another map pass.
        """
        note, _ = unpack_state(self.identity, state)
        self._position, self._guest, self._carried = note["at"]

    def _put(self, data: Slice | bytes | None, length: int, guest_bytes: int) -> Piece:
        piece = Piece(self._position, length, data, guest_bytes)
        self._position += length
        return piece

    # -- tables ----------------------------------------------------------------------------------------------------

    def _tables_bytes(self) -> Iterator[bytes]:
        """Everything before the clusters, in stretches of at most 1 MiB and a cluster."""
        import numpy

        geometry, places, size = self._geometry, self._places, self._cluster
        yield pack_header(
            geometry,
            l1_offset=places.l1,
            table_offset=places.refcount_table,
            table_clusters=(places.refcount_blocks - places.refcount_table) // size,
        ).ljust(size, b"\0")
        yield from _entries(
            places.refcount_blocks, places.l1, size, length=places.refcount_blocks - places.refcount_table
        )
        kind = ">u2" if geometry.refcount_bits == 16 else "u1"
        total = places.end // size
        per_block = geometry.counts_per_block
        for block in range((places.l1 - places.refcount_blocks) // size):
            counts = numpy.zeros(per_block, kind)
            counts[: max(0, min(per_block, total - block * per_block))] = 1
            yield counts.tobytes()
        yield from self._l1_bytes()
        for _, ranks, flags in _tables(geometry, self._map):
            entries = numpy.zeros(geometry.l2_entries, ">u8")
            offsets = (places.data + ranks.astype(numpy.uint64) * numpy.uint64(size)) | numpy.uint64(_COPIED)
            entries[: len(flags)] = numpy.where(flags, offsets, numpy.uint64(0))
            yield entries.tobytes()

    def _l1_bytes(self) -> Iterator[bytes]:
        import numpy

        geometry, places, size = self._geometry, self._places, self._cluster
        table = numpy.zeros((places.l2 - places.l1) // 8, ">u8")
        for number, (index, _, _) in enumerate(_tables(geometry, self._map)):
            table[index] = (places.l2 + number * size) | _COPIED
        whole = table.tobytes()
        for start in range(0, len(whole), _STRETCH):
            yield whole[start : start + _STRETCH]


def _entries(first: int, end: int, step: int, *, length: int) -> Iterator[bytes]:
    """Table entries for neighbouring clusters [first, end), zeros up to `length`, in stretches."""
    import numpy

    table = numpy.zeros(length // 8, ">u8")
    table[: (end - first) // step] = numpy.arange(first, end, step, dtype=numpy.uint64)
    whole = table.tobytes()
    for start in range(0, len(whole), _STRETCH):
        yield whole[start : start + _STRETCH]


def _tables(geometry: Geometry, found: DataMap) -> Iterator[tuple[int, numpy.ndarray, numpy.ndarray]]:
    """(L1 index, rank of each of its clusters among the stored, is it stored) of every L2 table that is not empty."""
    import numpy

    before = 0
    for index in range(geometry.l1_entries):
        first = index * geometry.l2_entries
        flags = found.flags(first, min(first + geometry.l2_entries, geometry.clusters))
        count = int(numpy.count_nonzero(flags))
        if count:
            yield index, before + numpy.cumsum(flags, dtype=numpy.int64) - flags, flags
            before += count
