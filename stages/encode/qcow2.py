"""qcow2 version 3 in one pass: clusters appended in guest order, tables behind them, the header last.

    0            header_length: the header, then clusters that nothing refers to (up to the smallest part of a store)
    head_length  windows: compressed clusters packed byte by byte, a pad, plain clusters; L2 tables and refcount blocks
                 in between, as soon as the guest or the image has passed what they describe
    the end      last L2 tables, L1, last refcount blocks, refcount table

Only the header depends on what comes after it, so that only the first bytes are written late. Zero clusters have no
entry. What a window becomes does not depend on threads: `prepare` knows no offsets, and `place` sees windows in order.

Source: QCOW2 image format, "Header", "Host cluster management", "Cluster mapping", "Compressed Clusters Descriptor".
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from pipeline.errors import StageError
from pipeline.flow.buffers import Charge, Slice, charged_slice, loose_slice
from pipeline.flow.items import Block, Piece
from pipeline.flow.orders import Order
from pipeline.flow.stage import BLOCKS, Layout, LayoutRequest, StageContext, StageSpec, option, pieces
from pipeline.units import KiB, MiB, Size, round_up
from stages.encode.checkpoints import identify, pack_state, unpack_state
from stages.encode.grains import touched_grains
from stages.encode.qcow2_geometry import CLUSTER_MAX, CLUSTER_MIN, Geometry, plan_geometry
from stages.encode.qcow2_header import DEFLATE, ZSTD, pack_header

if TYPE_CHECKING:
    from stages.encode.qcow2_mapped import MappedQcow2Encoder

_COMPRESSION_TYPES = {"none": DEFLATE, "zlib": DEFLATE, "zstd": ZSTD}

# Tables are handed on in stretches of this length, so that the longest of them (32 MiB) needs no memory of its own.
_STRETCH = 1 * MiB

_STATE_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Options of encode.qcow2."""

    compression: Literal["none", "zlib", "zstd"] = option(
        "zlib", doc="How clusters are compressed; every reader and cloud knows zlib, zstd needs QEMU 5.1 or later."
    )
    level: Literal["fast", "small"] = option("fast", doc="small takes longer (zlib 3 times) for a smaller image.")
    cluster_size: Size = option(
        Size(64 * KiB), doc='Power of two from "512 B" to "2 MiB"; larger ones pack better and waste more.'
    )

    def __post_init__(self) -> None:
        size = self.cluster_size
        if not CLUSTER_MIN <= size <= CLUSTER_MAX or size & (size - 1):
            raise ValueError('cluster_size must be a power of two from "512 B" to "2 MiB", for example "64 KiB"')


@dataclass(frozen=True, slots=True)
class Clusters:
    """What a block needs to be placed. Owns `data`.

    Attributes:
        data: streams of the compressed clusters, packed, then the plain clusters; or the block's own bytes.
        packed: clusters of the block that were compressed, ascending, with `sizes` of their streams.
        plain: (first, stop) clusters of the block that are stored as they are, ascending.
        stretches: (start, stop) of `data` for the plain clusters; the last cluster of a disk may be short, and what is
            written next pads it.
    """

    offset: int
    length: int
    data: Slice | None = None
    packed: Sequence[int] = ()
    sizes: Sequence[int] = ()
    plain: Sequence[tuple[int, int]] = ()
    stretches: Sequence[tuple[int, int]] = ()


class Qcow2Encoder:
    """Append clusters in guest order and keep the tables that describe them."""

    def __init__(self, options: Options, context: StageContext) -> None:
        from stages.encode.codecs import deflate, zstd
        from stages.encode.qcow2_tables import GuestTables, Refcounts

        self._geometry = geometry = plan_geometry(
            cluster_size=options.cluster_size,
            compressed=options.compression != "none",
            disk_size=context.disk_size,
            window=context.window,
            head_minimum=context.layout.head_length if context.layout else 0,
        )
        self._compression = options.compression
        self._cluster = int(options.cluster_size)
        if options.compression == "none":
            self._codec = None
        elif options.compression == "zlib":
            self._codec = deflate(options.level)
        else:
            self._codec = zstd(options.level, self._cluster)
        self._disk_size = context.disk_size
        self._window = context.window
        self._identity = ""
        self._position = geometry.head_length
        self._guest = 0  # guest offset behind the last block placed
        self._carried = 0  # guest bytes placed that no piece accounts for yet
        self._tables = GuestTables(geometry)
        self._refcounts = Refcounts(geometry)
        self._refcounts.count(0, 1)

    @property
    def position(self) -> int:
        """Image offset behind the last byte placed."""
        return self._position

    @property
    def identity(self) -> str:
        """A digest of all that shapes the image besides the disk: options, geometry, window, what the codec makes."""
        if not self._identity:
            self._identity = identify(
                encoder=f"qcow2 {_STATE_VERSION}",
                codec=self._codec.identity() if self._codec else "none",
                cluster_size=self._cluster,
                disk_size=self._disk_size,
                window=self._window,
                head_length=self._geometry.head_length,
                refcount_bits=self._geometry.refcount_bits,
            )
        return self._identity

    def prepare(self, block: Block, charge: Charge | None) -> Clusters:
        """Compress the clusters of a block that any data run touches, all in one go.

        Takes over the block's slice, which is given back once its clusters are made, or passed on when nothing is
        compressed. What a cluster does not shrink by is stored plain. Besides `charge`, the streams of one window
        exist twice for the moment in which they are joined.

        Threads: any, several at once; keeps no state.
        """
        source = block.data
        ranges = [] if source is None else touched_grains(block.runs, block.offset, self._cluster)
        if source is not None and ranges and self._codec is not None:
            try:
                return self._compress(block, source.view, ranges, charge)
            except BaseException:
                if charge is not None:
                    charge.release()
                raise
            finally:
                source.release()
        if charge is not None:
            charge.release()
        if source is None or not ranges:
            block.release()
            return Clusters(block.offset, block.length)
        size = self._cluster
        stretches = [(first * size, min(stop * size, block.length)) for first, stop in ranges]
        return Clusters(block.offset, block.length, source, plain=ranges, stretches=stretches)

    def _compress(
        self, block: Block, view: memoryview, ranges: list[tuple[int, int]], charge: Charge | None
    ) -> Clusters:
        assert self._codec is not None
        size, compress = self._cluster, self._codec.compress
        packed: list[int] = []
        streams: list[bytes | memoryview] = []
        plain: list[tuple[int, int]] = []
        whole: list[bytes | memoryview] = []
        for first, stop in ranges:
            for number in range(first, stop):
                cluster: bytes | memoryview = view[number * size : (number + 1) * size]
                if len(cluster) < size:
                    cluster = bytes(cluster).ljust(size, b"\0")
                stream = compress(cluster)
                if len(stream) < size:
                    packed.append(number)
                    streams.append(stream)
                else:
                    whole.append(cluster)
                    if plain and plain[-1][1] == number:
                        plain[-1] = (plain[-1][0], number + 1)
                    else:
                        plain.append((number, number + 1))
        sizes = [len(stream) for stream in streams]
        made = b"".join(streams + whole)
        data = charged_slice(made, charge) if charge is not None else loose_slice(made)
        middle = sum(sizes)
        stretches = [(middle, len(made))] if plain else []
        return Clusters(block.offset, block.length, data, packed, sizes, plain, stretches)

    def place(self, prepared: Clusters) -> list[Piece]:
        """Assign image offsets to a block's clusters, and write the tables that it leaves behind it.

        Raises:
            StageError: the blocks don't come in guest order.
        """
        placed: list[Piece] = []
        try:
            if prepared.offset != self._guest:
                raise StageError(
                    "the blocks of the disk do not come in order",
                    operation="place",
                    expected=self._guest,
                    offset=prepared.offset,
                )
            if prepared.data is not None:
                self._place_clusters(prepared, prepared.data, placed)
        finally:
            if prepared.data is not None:
                prepared.data.release()
        self._guest += prepared.length
        self._carried += prepared.length
        placed += self._write_l2(self._tables.take_closed(self._guest // self._cluster))
        if placed:
            placed[-1] = replace(placed[-1], guest_bytes=self._take_carried())
        return placed

    def _place_clusters(self, prepared: Clusters, data: Slice, placed: list[Piece]) -> None:
        first = prepared.offset // self._cluster
        if prepared.packed:
            self._tables.set_compressed(first, prepared.packed, prepared.sizes, self._position)
            self._refcounts.count_streams(prepared.sizes, self._position)
            length = sum(prepared.sizes)
            placed.append(self._put(data.share(0, length), length))
        if not prepared.plain:
            return
        placed += self._align()
        position = self._position
        for start, stop in prepared.plain:
            self._tables.set_plain(first + start, first + stop, position)
            position += (stop - start) * self._cluster
        self._refcounts.count(self._position // self._cluster, position // self._cluster)
        for start, stop in prepared.stretches:
            placed.append(self._put(data.share(start, stop), stop - start))

    def finish(self) -> Iterator[Piece]:
        """The last L2 tables, L1, the last refcount blocks, the refcount table; then the head.

        Raises:
            StageError: the blocks ended before the disk.
        """
        if self._guest != self._disk_size:
            raise StageError(
                "the blocks do not end with the disk", operation="finish", expected=self._disk_size, got=self._guest
            )
        for piece in self._finish():
            carried = self._take_carried()
            yield replace(piece, guest_bytes=carried) if carried else piece

    def _finish(self) -> Iterator[Piece]:
        geometry, refcounts, size = self._geometry, self._refcounts, self._cluster
        yield from self._write_l2(self._tables.take_all())
        yield from self._align()

        l1_offset = self._position
        l1_end = l1_offset + round_up(8 * geometry.l1_entries, size)
        refcounts.count(l1_offset // size, l1_end // size)
        for start in range(0, l1_end - l1_offset, _STRETCH):
            stop = min(start + _STRETCH, l1_end - l1_offset)
            yield self._put(self._tables.l1_bytes(start, stop), stop - start)

        written = len(refcounts.table)
        used = self._position // size
        blocks, table_clusters = geometry.close(used, written)
        refcounts.count(used, used + blocks - written + table_clusters)
        for _ in range(written, blocks):
            yield self._put(refcounts.take_next(self._position), size)

        table_offset = self._position
        for start in range(0, table_clusters * size, _STRETCH):
            stop = min(start + _STRETCH, table_clusters * size)
            yield self._put(refcounts.table_bytes(start, stop), stop - start)

        header = self._header(l1_offset, table_offset, table_clusters).ljust(size, b"\0")
        yield Piece(0, size, header, 0)
        if geometry.head_length > size:
            yield Piece(size, geometry.head_length - size, None, 0)

    def _header(self, l1_offset: int, table_offset: int, table_clusters: int) -> bytes:
        return pack_header(
            self._geometry,
            l1_offset=l1_offset,
            table_offset=table_offset,
            table_clusters=table_clusters,
            compression=_COMPRESSION_TYPES[self._compression],
        )

    def checkpoint(self) -> bytes:
        """All of the state: positions, L1 and the refcount table so far, what is open. Compressed."""
        first_table, guest_parts = self._tables.dump()
        note = {
            "position": self._position,
            "guest": self._guest,
            "carried": self._carried,
            "first_table": first_table,
        }
        return pack_state(self.identity, note, [*guest_parts, *self._refcounts.dump(self._position)])

    def restore(self, state: bytes) -> None:
        """Go back to a checkpoint.

        Raises:
            PlanError: it is damaged, or was made with other options, for another disk, or by a codec that gives
                other bytes.
        """
        note, parts = unpack_state(self.identity, state)
        self._position, self._guest, self._carried = note["position"], note["guest"], note["carried"]
        self._tables.load(note["first_table"], parts[:2])
        self._refcounts.load(parts[2:])

    def _write_l2(self, closed: Iterator[tuple[int, bytes]]) -> Iterator[Piece]:
        """Append L2 tables, and the refcount blocks that the image has passed: here it is aligned anyway."""
        for index, table in closed:
            yield from self._align()
            self._tables.set_l2(index, self._position)
            yield self._put_metadata(table)
            while block := self._refcounts.take_passed(self._position):
                yield self._put_metadata(block)

    def _put_metadata(self, cluster: bytes) -> Piece:
        number = self._position // self._cluster
        self._refcounts.count(number, number + 1)
        return self._put(cluster, self._cluster)

    def _put(self, data: Slice | bytes | None, length: int) -> Piece:
        piece = Piece(self._position, length, data, 0)
        self._position += length
        return piece

    def _align(self) -> Iterator[Piece]:
        """Zeros up to the next cluster of the image."""
        pad = -self._position % self._cluster
        if pad:
            yield self._put(None, pad)

    def _take_carried(self) -> int:
        carried, self._carried = self._carried, 0
        return carried


def build(options: Options, context: StageContext) -> Qcow2Encoder | MappedQcow2Encoder:
    """The encoder for the order in which pieces travel."""
    if context.order is not Order.SEQUENTIAL:
        return Qcow2Encoder(options, context)
    from stages.encode.qcow2_mapped import MappedQcow2Encoder

    geometry = _plan_mapped(options, disk_size=context.disk_size, window=context.window)
    return MappedQcow2Encoder(geometry, context)


def _plan_mapped(options: Options, *, disk_size: int, window: int) -> Geometry:
    return plan_geometry(
        cluster_size=options.cluster_size, compressed=False, disk_size=disk_size, window=window, head_minimum=0
    )


def plan_layout(options: Options, request: LayoutRequest) -> Layout:
    """How long the image can get, and how long its head is.

    Raises:
        PlanError: the clusters are too small for the disk; the hint names the smallest that work.
    """
    compressed = options.compression != "none"
    if request.order is Order.SEQUENTIAL:
        return _mapped_layout(options, request)
    geometry = plan_geometry(
        cluster_size=options.cluster_size,
        compressed=compressed,
        disk_size=request.disk_size,
        window=request.window,
        head_minimum=request.head_minimum,
    )
    return Layout(
        format="qcow2",
        virtual_size=geometry.virtual_size,
        head_length=geometry.head_length,
        image_bytes_max=geometry.worst_case[0],
        made_max=request.window if compressed else 0,
        grain=int(options.cluster_size),
        skips_grow=False,
    )


def _mapped_layout(options: Options, request: LayoutRequest) -> Layout:
    from stages.encode.qcow2_mapped import complete_map, plan_places

    geometry = _plan_mapped(options, disk_size=request.disk_size, window=request.window)
    found = complete_map(request.map) if request.map else None
    end = plan_places(geometry, found).end if found else None
    return Layout(
        format="qcow2",
        virtual_size=geometry.virtual_size,
        head_length=0,
        image_bytes_max=end or geometry.worst_case[0],
        image_bytes=end,
        grain=int(options.cluster_size),
        notes=("the target takes the image from its first byte to its last, so the disk is looked at twice: first for "
               "a map of what holds data; it must not change in between",),
        map=found,
    )  # fmt: skip


def orders(options: Options) -> tuple[Order, ...]:
    """Only plain clusters have places that a map tells before they are read."""
    return (Order.HEAD_LAST, Order.SEQUENTIAL) if options.compression == "none" else (Order.HEAD_LAST,)


def orders_hint(options: Options) -> str:
    """Why compressed clusters can't travel in sequence."""
    if options.compression == "none":
        return ""
    return (
        "the header of a compressed qcow2 names places that are known at its end only: set compression to "
        '"none" (and add compress.zstd), or write a streamOptimized encode.vmdk or an encode.raw'
    )


def map_unit(options: Options, order: Order) -> int | None:
    """In sequence, which clusters hold data has to be known first."""
    return int(options.cluster_size) if order is Order.SEQUENTIAL else None


SPEC = StageSpec(
    name="encode.qcow2",
    summary="Write a qcow2 image, compressed by default, without reading the disk twice.",
    options=Options,
    takes=BLOCKS,
    gives=pieces(Order.HEAD_LAST, Order.SEQUENTIAL),
    build=build,
    layout=plan_layout,
    orders=orders,
    orders_hint=orders_hint,
    map_unit=map_unit,
)
