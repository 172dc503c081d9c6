"""VMDK: streamOptimized in one pass, for clouds and ESXi; monolithicSparse for hosted VMware products.

    monolithicSparse   header | descriptor | directory, tables | the same again | stored grains

Source: VMware Virtual Disk Format 5.0, "Hosted Sparse Extents".
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from pipeline.errors import PlanError
from pipeline.flow.orders import Order
from pipeline.flow.stage import BLOCKS, Layout, LayoutRequest, StageContext, StageSpec, option, pieces
from pipeline.units import MiB, TiB, format_exact, format_size, round_up
from stages.encode.allocation import AllocatingEncoder, StoredUnits
from stages.encode.birth import REPRODUCIBLE_DOC, Birth
from stages.encode.rounding import round_disk
from stages.encode.vmdk_stream import RECORD_MAX, StreamOptimizedEncoder, longest_stream
from stages.encode.vmdk_structures import (
    DESCRIPTOR_SECTOR,
    DESCRIPTOR_SECTORS,
    GRAIN,
    IMAGE_MAX,
    SECTOR,
    TABLE_ENTRIES,
    TABLE_REACH,
    TABLE_SECTORS,
    Adapter,
    descriptor,
    header,
)

# VMware's converter never ends on a disk that is no multiple of 64 KiB, and importers want whole MiB.
ROUND = 1 * MiB
SIZE_MAX = 62 * TiB  # VMware's own limit
# What a monolithicSparse image keeps until its end, where the target takes the head last: 16 MiB serve a disk of
# 127 GiB. It waits in memory beside everything else, so that more would break the promise about memory.
HEAD_LAST_MAX = 16 * MiB


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Options of encode.vmdk."""

    variant: Literal["streamOptimized", "monolithicSparse"] = option(
        "streamOptimized", doc="streamOptimized is compressed and what importers want; monolithicSparse is not."
    )
    level: Literal["fast", "small"] = option(
        "fast", doc="Of streamOptimized: small takes 3 times as long for an image that is 8 % smaller."
    )
    adapter: Adapter = option("lsilogic", doc="The controller that the image asks for.")
    reproducible: bool = option(True, doc=REPRODUCIBLE_DOC)


@dataclass(frozen=True, slots=True)
class MonolithicSparse:
    """The layout of a monolithicSparse VMDK. Bytes, unless the name says otherwise."""

    size: int
    head_length: int
    extent: str
    adapter: Adapter
    unit: int = GRAIN
    prefix: bytes = b""

    @property
    def name(self) -> str:
        """With what shapes the head."""
        return f"vmdk sparse {self.extent} {self.adapter}"

    @property
    def units(self) -> int:
        """Grains; the size is a multiple of theirs."""
        return self.size // GRAIN

    def head(self, stored: StoredUnits, birth: Birth) -> Iterator[bytes | int]:
        """Header, descriptor, and two copies of directory and tables.

        The tables stand where VMware expects them and are all there, so that readers which compute their places find
        them too.
        """
        capacity, tables = self.size // SECTOR, -(-self.size // TABLE_REACH)
        second = DESCRIPTOR_SECTOR + DESCRIPTOR_SECTORS
        directory = second + _directory_sectors(tables) + tables * TABLE_SECTORS
        yield header(
            "monolithicSparse",
            capacity,
            directory=directory,
            second_directory=second,
            overhead=self.head_length // SECTOR,
        )
        yield descriptor("monolithicSparse", capacity, name=self.extent, adapter=self.adapter, birth=birth)
        for start in (second, directory):
            yield from _directory(start, tables)
            yield from self._tables(stored)
            yield (tables * TABLE_ENTRIES - self.units) * 4

    def _tables(self, stored: StoredUnits) -> Iterator[bytes | int]:
        import numpy

        first = self.head_length // SECTOR
        for flags, ranks in stored.stretches():
            if flags.any():
                yield numpy.where(flags, first + ranks * (GRAIN // SECTOR), 0).astype("<u4").tobytes()
            else:
                yield 4 * len(flags)

    def tail(self, birth: Birth) -> bytes:
        """Nothing."""
        return b""


def _directory_sectors(tables: int) -> int:
    return -(-4 * tables // SECTOR)


def _directory(start: int, tables: int) -> Iterator[bytes]:
    """A directory at sector `start`, whose tables follow it."""
    import numpy

    length = _directory_sectors(tables)
    entries = numpy.zeros(length * SECTOR // 4, "<u4")
    entries[:tables] = start + length + numpy.arange(tables) * TABLE_SECTORS
    yield entries.tobytes()


def build(options: Options, context: StageContext) -> AllocatingEncoder | StreamOptimizedEncoder:
    """The encoder of the variant."""
    size, _ = round_disk(context.disk_size, ROUND, "")
    if options.variant == "streamOptimized":
        return StreamOptimizedEncoder(
            context,
            size=size,
            level=options.level,
            adapter=options.adapter,
            birth=Birth.of(options.reproducible, context),
            name=context.export_name,
        )
    head = context.layout.head_length if context.layout else 0
    scheme = _plan_sparse(size, head, extent=context.export_name, adapter=options.adapter)
    return AllocatingEncoder(scheme, context, reproducible=options.reproducible)


def _plan_sparse(size: int, head_minimum: int, *, extent: str, adapter: Adapter) -> MonolithicSparse:
    tables = -(-size // TABLE_REACH)
    sectors = DESCRIPTOR_SECTOR + DESCRIPTOR_SECTORS + 2 * (_directory_sectors(tables) + tables * TABLE_SECTORS)
    head = round_up(max(sectors * SECTOR, head_minimum), GRAIN)
    return MonolithicSparse(size=size, head_length=head, extent=extent, adapter=adapter)


def plan_layout(options: Options, request: LayoutRequest) -> Layout:
    """How long the image can get.

    Raises:
        PlanError: the disk is larger than the variant can address, or a head would have to wait that is too long.
    """
    size, notes = round_disk(request.disk_size, ROUND, "importers of VMDK take no other sizes")
    if request.window % GRAIN:
        raise PlanError(
            "the window that is read at once is no multiple of a grain of 64 KiB",
            operation="plan",
            window=format_size(request.window),
        )
    if options.variant == "streamOptimized":
        return _plan_stream(size, notes, request.window)
    scheme = _plan_sparse(size, request.head_minimum, extent="", adapter=options.adapter)
    longest = scheme.head_length + size
    if longest > IMAGE_MAX:
        raise PlanError(
            f"a monolithicSparse VMDK of {format_exact(size)} could outgrow the 2 TiB that its tables address",
            operation="plan",
            hint='Set variant = "streamOptimized" in encode.vmdk, or write encode.vhdx, encode.qcow2 or encode.raw.',
        )
    if request.order is Order.HEAD_LAST and scheme.head_length > HEAD_LAST_MAX:
        raise PlanError(
            f"the tables of a monolithicSparse VMDK of {format_exact(size)} take "
            f"{format_size(scheme.head_length)}, and this target takes them last: they would have to wait in memory, "
            f"where {format_size(HEAD_LAST_MAX)} are allowed",
            operation="plan",
            hint='Set variant = "streamOptimized" in encode.vmdk, or write to a file or block device.',
        )
    return Layout(
        format="vmdk",
        virtual_size=size,
        head_length=scheme.head_length,
        image_bytes_max=longest,
        grain=GRAIN,
        notes=notes,
    )


def _plan_stream(size: int, notes: tuple[str, ...], window: int) -> Layout:
    if size > SIZE_MAX:
        raise PlanError(
            f"VMware knows no disks beyond {format_size(SIZE_MAX)}, and this one is {format_exact(size)}",
            operation="plan",
            hint="Write encode.vhdx (up to 64 TiB), encode.qcow2 or encode.raw.",
        )
    if size // GRAIN * RECORD_MAX > IMAGE_MAX:
        # What the disk shrinks to is not known before it is read; most that are this large are not full either.
        notes = (
            *notes,
            "a VMDK can't grow beyond 2 TiB: should the compressed data of this disk reach that, the run fails; "
            "encode.qcow2, encode.vhdx and encode.raw have no such limit",
        )
    return Layout(
        format="vmdk",
        virtual_size=size,
        head_length=0,
        image_bytes_max=longest_stream(size),
        made_max=window // GRAIN * RECORD_MAX,
        grain=GRAIN,
        notes=notes,
    )


def orders(options: Options) -> tuple[Order, ...]:
    """A stream needs nothing patched; the tables of the other variant are long, so free access is better."""
    return (Order.SEQUENTIAL,) if options.variant == "streamOptimized" else (Order.RANDOM, Order.HEAD_LAST)


SPEC = StageSpec(
    name="encode.vmdk",
    summary="Write a VMDK: compressed in one pass for clouds and ESXi, or sparse for hosted VMware products.",
    options=Options,
    takes=BLOCKS,
    gives=pieces(Order.SEQUENTIAL, Order.RANDOM, Order.HEAD_LAST),
    build=build,
    layout=plan_layout,
    orders=orders,
)
