"""Where an encoder stands: in the guest disk, in the image, and what no piece accounts for yet."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from pipeline.errors import StageError
from pipeline.flow.buffers import Slice
from pipeline.flow.items import Piece


class Cursor:
    """Appends pieces, and hands every guest byte to one of them.

    Attributes:
        position: image offset behind the last byte placed.
        guest: guest offset behind the last block placed.
        carried: guest bytes placed that no piece accounts for yet.
    """

    __slots__ = ("_disk_size", "carried", "guest", "position")

    def __init__(self, position: int, disk_size: int) -> None:
        self.position = position
        self.guest = 0
        self.carried = 0
        self._disk_size = disk_size

    def enter(self, offset: int) -> None:
        """A block of the disk is going to be placed. Raises StageError where it is not the next."""
        if offset != self.guest:
            raise StageError(
                "the blocks of the disk do not come in order", operation="place", expected=self.guest, offset=offset
            )

    def leave(self, length: int, placed: list[Piece]) -> list[Piece]:
        """The block's pieces; the last of them accounts for the block and all that was carried."""
        self.guest += length
        self.carried += length
        if placed:
            placed[-1] = self.settle(placed[-1])
        return placed

    def settle(self, piece: Piece) -> Piece:
        """The piece, accounting for what is carried too."""
        carried, self.carried = self.carried, 0
        return replace(piece, guest_bytes=piece.guest_bytes + carried) if carried else piece

    def put(self, data: Slice | bytes | None, length: int) -> Piece:
        """A piece of `length` bytes, appended. None: zeros."""
        piece = Piece(self.position, length, data, 0)
        self.position += length
        return piece

    def zeros(self, length: int) -> Iterator[Piece]:
        """Zeros, appended; nothing where there are none."""
        if length:
            yield self.put(None, length)

    def check_end(self) -> None:
        """Raises StageError when the blocks ended before the disk."""
        if self.guest != self._disk_size:
            raise StageError(
                "the blocks do not end with the disk", operation="finish", expected=self._disk_size, got=self.guest
            )

    def dump(self) -> list[int]:
        """For a checkpoint."""
        return [self.position, self.guest, self.carried]

    def load(self, numbers: list[int]) -> None:
        """Go back to a dump."""
        self.position, self.guest, self.carried = numbers
