"""The disk as it is, with its zeros left out where the sink can leave them out.

The image is the guest disk byte for byte; a zero run becomes a piece without data. A disk that does not end on a
sector is padded with zeros to the next one, because tools read raw images by sectors of 512 bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.errors import PlanError, StageError
from pipeline.flow.buffers import Charge, Slice
from pipeline.flow.items import Block, Content, Piece
from pipeline.flow.orders import Order
from pipeline.flow.stage import BLOCKS, Layout, LayoutRequest, StageContext, StageSpec, pieces
from pipeline.units import KiB, round_up

SECTOR = 512

# Filesystems allocate by 4 KiB: at 64 KiB the image of a Debian disk holds 9 % more data, at 512 bytes the pieces
# become too many to be worth it.
GRAIN = 4 * KiB

# version, disk size, position
_STATE = struct.Struct(">4sQQ")
_STATE_VERSION = b"raw1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """encode.raw has no options."""


@dataclass(frozen=True, slots=True)
class Stretches:
    """A block as stretches of equal content, tiling it. Owns the slice."""

    offset: int
    length: int
    data: Slice | None
    stretches: Sequence[tuple[int, Content]]  # (guest bytes, content)


class RawEncoder:
    """Give every data stretch of a window its own place in the image, without copying it."""

    def __init__(self, options: Options, context: StageContext) -> None:
        self._disk_size = context.disk_size
        self._position = 0

    @property
    def position(self) -> int:
        """Image offset behind the last byte placed."""
        return self._position

    def prepare(self, block: Block, charge: Charge | None) -> Stretches:
        """Join neighbouring runs of equal content. Threads: any; keeps the block's slice, gives `charge` back."""
        if charge is not None:
            charge.release()
        if block.data is None:
            return Stretches(block.offset, block.length, None, ((block.length, Content.ZERO),))
        stretches: list[tuple[int, Content]] = []
        for run in block.runs:
            if stretches and stretches[-1][1] is run.content:
                stretches[-1] = (stretches[-1][0] + run.length, run.content)
            else:
                stretches.append((run.length, run.content))
        return Stretches(block.offset, block.length, block.data, stretches)

    def place(self, prepared: Stretches) -> list[Piece]:
        """One piece a stretch, at the offset that the disk has it. The caller owns the pieces.

        Raises:
            StageError: the blocks don't come in guest order.
        """
        whole = prepared.data
        try:
            if prepared.offset != self._position:
                raise StageError(
                    "the blocks of the disk do not come in order",
                    operation="place",
                    expected=self._position,
                    offset=prepared.offset,
                )
            placed = []
            start = 0
            for length, content in prepared.stretches:
                data = whole.share(start, start + length) if whole is not None and content is Content.DATA else None
                placed.append(Piece(self._position, length, data, length))
                self._position += length
                start += length
        finally:
            if whole is not None:
                whole.release()
        return placed

    def finish(self) -> list[Piece]:
        """The zeros up to the next sector, which are no part of the disk.

        Raises:
            StageError: the blocks ended before the disk.
        """
        if self._position < self._disk_size:
            raise StageError(
                "the blocks ended before the disk", operation="finish", expected=self._disk_size, got=self._position
            )
        pad = round_up(self._disk_size, SECTOR) - self._position
        if pad == 0:
            return []
        piece = Piece(self._position, pad, None, 0)
        self._position += pad
        return [piece]

    def checkpoint(self) -> bytes:
        """The position; nothing else is remembered."""
        return _STATE.pack(_STATE_VERSION, self._disk_size, self._position)

    def restore(self, state: bytes) -> None:
        """Go back to a checkpoint.

        Raises:
            PlanError: it was made by another version, or for another disk.
        """
        try:
            version, disk_size, position = _STATE.unpack(state)
        except struct.error:
            version, disk_size, position = b"", 0, 0
        if (version, disk_size) != (_STATE_VERSION, self._disk_size):
            raise PlanError(
                "the checkpoint belongs to another export",
                operation="restore",
                hint="Resume with the same program version, options and disk, or start the export again.",
            )
        self._position = position


def plan_layout(options: Options, request: LayoutRequest) -> Layout:
    """The image of a raw disk: its length is known exactly."""
    size = round_up(request.disk_size, SECTOR)
    return Layout(
        format="raw",
        virtual_size=size,
        head_length=0,
        image_bytes_max=size,
        image_bytes=size,
        made_max=0,
        grain=GRAIN,
        positional=True,
    )


SPEC = StageSpec(
    name="encode.raw",
    summary="Write the disk as it is; zeros are left out where the target can leave them out.",
    options=Options,
    takes=BLOCKS,
    gives=pieces(Order.SPARSE, Order.SEQUENTIAL),
    build=RawEncoder,
    layout=plan_layout,
)
