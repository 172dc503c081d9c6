"""VHDX, dynamic: a table of the blocks that hold data, which lie at whole MiB.

    0            identifier, two headers, two region tables, an empty log, metadata, block allocation table
    head_length  stored blocks in guest order

Source: MS-VHDX, "Layout Overview", "BAT Structure".
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pipeline.errors import PlanError
from pipeline.flow.orders import Order
from pipeline.flow.stage import BLOCKS, Layout, LayoutRequest, StageContext, StageSpec, option, pieces
from pipeline.units import MiB, TiB, format_exact, round_up
from stages.encode.allocation import GRAIN, AllocatingEncoder, StoredUnits
from stages.encode.birth import REPRODUCIBLE_DOC, Birth
from stages.encode.rounding import round_disk
from stages.encode.vhdx_structures import (
    ALIGNMENT,
    LOG_LENGTH,
    METADATA_LENGTH,
    TABLE_OFFSET,
    front,
    metadata,
    table,
    table_length,
)

ROUND = 1 * MiB
SIZE_MAX = 64 * TiB
BLOCK_MIN = 2 * MiB
# Blocks are the smallest with which the table stays near 4 MiB: it is part of the head, which waits until the end.
# Fewer entries mean larger blocks, which store more zeros.
ENTRIES_MAX = 512 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Options of encode.vhdx."""

    reproducible: bool = option(True, doc=REPRODUCIBLE_DOC)


@dataclass(frozen=True, slots=True)
class DynamicVhdx:
    """The layout of a VHDX. Bytes."""

    size: int
    unit: int
    head_length: int
    name: str = "vhdx"
    prefix: bytes = b""

    @property
    def units(self) -> int:
        """Blocks, the last of which may reach beyond the disk."""
        return -(-self.size // self.unit)

    def head(self, stored: StoredUnits, birth: Birth) -> Iterator[bytes | int]:
        """All structures; there are none behind the blocks."""
        yield from front(table_length(self.units, self.unit), birth)
        yield LOG_LENGTH
        items = metadata(self.size, self.unit, birth)
        yield items
        yield METADATA_LENGTH - len(items)
        yield from table(stored, self.head_length, self.unit)

    def tail(self, birth: Birth) -> bytes:
        """Nothing."""
        return b""


def _plan(disk_size: int, head_minimum: int) -> DynamicVhdx:
    size, _ = round_disk(disk_size, ROUND, "")
    block = BLOCK_MIN
    while -(-size // block) > ENTRIES_MAX:
        block *= 2
    head = TABLE_OFFSET + table_length(-(-size // block), block)
    return DynamicVhdx(size=size, unit=block, head_length=round_up(max(head, head_minimum), ALIGNMENT))


def build(options: Options, context: StageContext) -> AllocatingEncoder:
    """The encoder for a disk."""
    scheme = _plan(context.disk_size, context.layout.head_length if context.layout else 0)
    return AllocatingEncoder(scheme, context, reproducible=options.reproducible)


def plan_layout(options: Options, request: LayoutRequest) -> Layout:
    """How long the image can get.

    Raises:
        PlanError: the disk is larger than the format allows.
    """
    size, notes = round_disk(request.disk_size, ROUND, "some readers of VHDX refuse other sizes")
    if size > SIZE_MAX:
        raise PlanError(
            f"a VHDX holds at most {format_exact(SIZE_MAX)}, and the disk is {format_exact(size)}",
            operation="plan",
            hint="Write encode.qcow2 or encode.raw.",
        )
    scheme = _plan(request.disk_size, request.head_minimum)
    return Layout(
        format="vhdx",
        virtual_size=size,
        head_length=scheme.head_length,
        image_bytes_max=scheme.head_length + scheme.units * scheme.unit,
        grain=GRAIN,
        notes=notes,
    )


SPEC = StageSpec(
    name="encode.vhdx",
    summary="Write a dynamic VHDX for Hyper-V and Windows tools; up to 64 TiB.",
    options=Options,
    takes=BLOCKS,
    gives=pieces(Order.HEAD_LAST),
    build=build,
    layout=plan_layout,
)
