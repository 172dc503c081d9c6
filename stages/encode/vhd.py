"""VHD: dynamic, with a table of the blocks that hold data, or fixed, which is the raw disk and a footer.

    dynamic   footer | header | table | free up to the smallest part of a store | blocks ... | footer
    fixed     the disk, byte for byte | footer

Source: Virtual Hard Disk Image Format Specification, "Dynamic Disks", "Fixed Hard Disks".
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from pipeline.errors import PlanError
from pipeline.flow.buffers import Charge
from pipeline.flow.items import Block, Piece
from pipeline.flow.orders import Order
from pipeline.flow.stage import BLOCKS, Layout, LayoutRequest, StageContext, StageSpec, option, pieces
from pipeline.units import GiB, KiB, MiB, format_exact, round_up
from stages.encode import raw
from stages.encode.allocation import GRAIN, AllocatingEncoder, StoredUnits
from stages.encode.birth import REPRODUCIBLE_DOC, Birth
from stages.encode.checkpoints import identify, pack_state, unpack_state
from stages.encode.rounding import round_disk
from stages.encode.vhd_structures import (
    BLOCK,
    BLOCK_PREFIX,
    FOOTER_LENGTH,
    PAGE,
    TABLE_OFFSET,
    dynamic_header,
    footer,
    table,
    table_length,
)

# Azure takes no other sizes, and whoever makes a VHD may want it there.
ROUND = 1 * MiB
DYNAMIC_MAX = 2040 * GiB


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Options of encode.vhd."""

    variant: Literal["dynamic", "fixed"] = option(
        "dynamic", doc="dynamic stores blocks of 2 MiB that hold data; fixed stores the whole disk, as Azure wants it."
    )
    reproducible: bool = option(True, doc=REPRODUCIBLE_DOC)


@dataclass(frozen=True, slots=True)
class DynamicVhd:
    """The layout of a dynamic VHD. Bytes."""

    size: int
    head_length: int
    name: str = "vhd dynamic"
    unit: int = BLOCK
    prefix: bytes = BLOCK_PREFIX

    @property
    def units(self) -> int:
        """Blocks, the last of which may reach beyond the disk."""
        return -(-self.size // BLOCK)

    @property
    def image_bytes_max(self) -> int:
        """With every block stored."""
        return self.head_length + self.units * (len(BLOCK_PREFIX) + BLOCK) + FOOTER_LENGTH

    def head(self, stored: StoredUnits, birth: Birth) -> Iterator[bytes | int]:
        """Footer, header, table."""
        yield footer("dynamic", self.size, birth)
        yield dynamic_header(self.units)
        for part in table(stored, self.head_length):
            if part:
                yield part

    def tail(self, birth: Birth) -> bytes:
        """The footer again."""
        return footer("dynamic", self.size, birth)


class FixedVhdEncoder:
    """The raw disk, padded to its virtual size, and a footer."""

    def __init__(self, options: Options, context: StageContext) -> None:
        self._disk = raw.RawEncoder(raw.Options(), context)
        self._size, _ = round_disk(context.disk_size, ROUND, "")
        self._disk_size = context.disk_size
        self._birth = Birth.of(options.reproducible, context)
        self._end = 0

    @property
    def position(self) -> int:
        """Image offset behind the last byte placed."""
        return self._end or self._disk.position

    @property
    def identity(self) -> str:
        """A digest of all that shapes the image besides the disk."""
        return identify(encoder="vhd fixed 1", disk_size=self._disk_size, birth=self._birth.shape)

    def prepare(self, block: Block, charge: Charge | None) -> raw.Stretches:
        """As the raw encoder does. Threads: any; keeps the block's slice, gives `charge` back."""
        return self._disk.prepare(block, charge)

    def place(self, prepared: raw.Stretches) -> list[Piece]:
        """As the raw encoder does. The caller owns the pieces."""
        return self._disk.place(prepared)

    def finish(self) -> Iterator[Piece]:
        """The zeros that were added, and the footer.

        Raises:
            StageError: the blocks ended before the disk.
        """
        yield from self._disk.finish()
        start, self._end = self._disk.position, self._size + FOOTER_LENGTH
        if start < self._size:
            yield Piece(start, self._size - start, None, 0)
        yield Piece(self._size, FOOTER_LENGTH, footer("fixed", self._size, self._birth), 0)

    def checkpoint(self) -> bytes:
        """The position, and who the image is."""
        return pack_state(self.identity, {"birth": self._birth.dump()}, [self._disk.checkpoint()])

    def restore(self, state: bytes) -> None:
        """Go back to a checkpoint.

        Raises:
            PlanError: it is damaged, or was made with other options or for another disk.
        """
        note, (disk,) = unpack_state(self.identity, state)
        self._disk.restore(disk)
        self._birth = self._birth.load(note["birth"])


def build(options: Options, context: StageContext) -> AllocatingEncoder | FixedVhdEncoder:
    """The encoder of the variant."""
    if options.variant == "fixed":
        return FixedVhdEncoder(options, context)
    size, _ = round_disk(context.disk_size, ROUND, "")
    head = context.layout.head_length if context.layout else 0
    return AllocatingEncoder(_plan_dynamic(size, head), context, reproducible=options.reproducible)


def _plan_dynamic(size: int, head_minimum: int) -> DynamicVhd:
    head = TABLE_OFFSET + table_length(-(-size // BLOCK))
    return DynamicVhd(size=size, head_length=round_up(max(head, head_minimum), PAGE))


def plan_layout(options: Options, request: LayoutRequest) -> Layout:
    """How long the image can get.

    Raises:
        PlanError: the disk is larger than a dynamic VHD can be.
    """
    size, notes = round_disk(request.disk_size, ROUND, "Azure takes VHDs of no other size")
    if options.variant == "fixed":
        if size > DYNAMIC_MAX:
            notes = (
                *notes,
                f"the virtual disk is larger than {DYNAMIC_MAX // GiB} GiB: Azure takes it as a managed disk, "
                "but QEMU and most other readers of VHD refuse it",
            )
        length = size + FOOTER_LENGTH
        return Layout(
            format="vhd",
            virtual_size=size,
            head_length=0,
            image_bytes_max=length,
            image_bytes=length,
            grain=4 * KiB,
            positional=True,
            notes=notes,
        )
    if size > DYNAMIC_MAX:
        raise PlanError(
            f"a dynamic VHD holds at most {DYNAMIC_MAX // GiB} GiB, and the disk is {format_exact(size)}",
            operation="plan",
            hint="Write encode.vhdx (up to 64 TiB), encode.qcow2 or encode.raw; for Azure set "
            'variant = "fixed" in encode.vhd.',
        )
    scheme = _plan_dynamic(size, request.head_minimum)
    return Layout(
        format="vhd",
        virtual_size=size,
        head_length=scheme.head_length,
        image_bytes_max=scheme.image_bytes_max,
        grain=GRAIN,
        notes=notes,
    )


def orders(options: Options) -> tuple[Order, ...]:
    """A fixed VHD needs nothing patched."""
    return (Order.SPARSE, Order.SEQUENTIAL) if options.variant == "fixed" else (Order.HEAD_LAST,)


SPEC = StageSpec(
    name="encode.vhd",
    summary="Write a VHD: dynamic for most readers, fixed for Azure; up to 2040 GiB.",
    options=Options,
    takes=BLOCKS,
    gives=pieces(Order.HEAD_LAST, Order.SPARSE, Order.SEQUENTIAL),
    build=build,
    layout=plan_layout,
    orders=orders,
)
