"""Turning pieces into writes that O_DIRECT takes: batches of aligned pieces, and packed streams of the others."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from pipeline.flow.buffers import Lease, Pool, Slice
from pipeline.flow.items import Piece
from pipeline.units import KiB

UNIT = 4 * KiB  # what O_DIRECT wants of offset, length and address on every disk in use
_ZEROS = bytes(64 * KiB)


@dataclass(slots=True)
class Batch:
    """Bytes at image offsets that are written with one thread call, and what has to be given back afterwards."""

    parts: list[tuple[int, memoryview]] = field(default_factory=list)
    guest_bytes: int = 0
    length: int = 0
    _slices: list[Slice] = field(default_factory=list)
    _lease: Lease | None = None

    def takes(self, piece: Piece) -> bool:
        """Whether the piece lies in the same buffer as those before."""
        return not self._slices or (isinstance(piece.data, Slice) and piece.data.shares_with(self._slices[0]))

    def add(self, piece: Piece) -> None:
        """Take over an aligned piece."""
        assert isinstance(piece.data, Slice), "only slices are aligned"
        self.parts.append((piece.offset, piece.data.view))
        self._slices.append(piece.data)
        self.guest_bytes += piece.guest_bytes
        self.length += piece.length

    def release(self) -> None:
        """Give everything back, after the write."""
        self.parts.clear()
        for data in self._slices:
            data.release()
        if self._lease is not None:
            self._lease.release()

    @classmethod
    def packed(cls, offset: int, view: memoryview, guest_bytes: int, lease: Lease) -> Batch:
        """A filled staging buffer."""
        return cls([(offset, view)], guest_bytes, view.nbytes, [], lease)


class Packer:
    """Copies pieces that follow each other into aligned buffers of a pool.

    The byte at image offset `x` lies in a buffer at an address that is `x` modulo UNIT, so whole units can be written
    with O_DIRECT.
    """

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._lease: Lease | None = None
        self._begin = 0  # index of the first byte in the buffer
        self._end = 0
        self._offset = 0  # image offset of the first byte
        self._guest_bytes = 0
        self._position = 0

    @property
    def is_open(self) -> bool:
        """Whether bytes wait to be written."""
        return self._lease is not None

    @property
    def offset(self) -> int:
        """Image offset of the first byte that waits."""
        return self._offset

    @property
    def at_unit(self) -> bool:
        """Whether the next byte starts a unit."""
        return self._end % UNIT == 0

    @property
    def position(self) -> int:
        """Image offset behind the last byte that was added; 0 before the first."""
        return self._position

    def follows(self, offset: int) -> bool:
        """Whether a piece at this image offset comes right behind the bytes that wait."""
        return self._lease is not None and offset == self._offset + self._end - self._begin

    async def add(self, piece: Piece) -> AsyncIterator[Batch]:
        """Copy the piece and release it; yields every buffer that it filled."""
        view = piece.view
        done = 0
        while done < piece.length:
            if self._lease is None:
                self._lease = await self._pool.lease()
                self._offset = piece.offset + done
                self._begin = self._end = self._offset % UNIT
            count = min(piece.length - done, self._pool.buffer_size - self._end)
            target = self._lease.buffer[self._end : self._end + count]
            if view is None:
                _fill_zeros(target)
            else:
                target[:] = view[done : done + count]
            self._end += count
            done += count
            if done == piece.length:
                self._guest_bytes += piece.guest_bytes
            if self._end == self._pool.buffer_size:
                yield self._close()
        self._position = piece.end
        piece.release()

    def take(self) -> Batch | None:
        """What waits to be written, if anything."""
        return self._close() if self._lease is not None else None

    def _close(self) -> Batch:
        assert self._lease is not None, "only an open buffer is closed"
        batch = Batch.packed(self._offset, self._lease.buffer[self._begin : self._end], self._guest_bytes, self._lease)
        self._lease = None
        self._guest_bytes = 0
        return batch


def is_aligned(piece: Piece) -> bool:
    """Whether the piece can be written from where it lies: offset, length and address in whole units."""
    if not isinstance(piece.data, Slice) or piece.offset % UNIT or piece.length % UNIT:
        return False
    import numpy

    address: int = numpy.frombuffer(piece.data.view, numpy.uint8).__array_interface__["data"][0]
    return address % UNIT == 0


def _fill_zeros(target: memoryview) -> None:
    for begin in range(0, target.nbytes, len(_ZEROS)):
        part = target[begin : begin + len(_ZEROS)]
        part[:] = _ZEROS[: part.nbytes]
