"""Formats that cut the guest disk into units of one length and store each that holds data, behind a late head.

    0            head_length: header and tables
    head_length  stored units in guest order, each behind its prefix; all of a unit is stored, its zeros too
    the end      what the format ends with

Because units are stored in guest order and take the same room, one bit a unit tells every table entry: the n-th stored
unit lies at head_length + n * (prefix + unit). So neither memory nor checkpoint hold the tables themselves.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from pipeline.flow.buffers import Charge, Slice
from pipeline.flow.items import Block, Piece
from pipeline.flow.stage import StageContext
from pipeline.units import KiB
from stages.encode.birth import Birth
from stages.encode.checkpoints import identify, pack_state, unpack_state
from stages.encode.cursor import Cursor
from stages.encode.grains import touched_grains

if TYPE_CHECKING:
    import numpy

# Zeros inside a stored unit become pieces without data from this length on. At 4 KiB a sparse file would hold a few
# percent less, and pieces would be too many; longer ones give files with fewer holes.
GRAIN = 64 * KiB
# Table entries are made in stretches of so many, so that no table needs memory as a whole. A multiple of 8.
STRETCH = 128 * KiB


class StoredUnits:
    """One bit for every unit of the disk: whether it is stored."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._bits = bytearray(-(-count // 8))

    def add(self, first: int, stop: int) -> None:
        """Units [first, stop) are stored."""
        bits = self._bits
        for unit in range(first, stop):
            bits[unit >> 3] |= 0x80 >> (unit & 7)

    def stretches(self) -> Iterator[tuple[numpy.ndarray, numpy.ndarray]]:
        """STRETCH units at a time (the last fewer): (is it stored, how many stored ones come before it)."""
        import numpy

        before = 0
        for start in range(0, self.count, STRETCH):
            length = min(STRETCH, self.count - start)
            part = numpy.frombuffer(self._bits, numpy.uint8, -(-length // 8), start // 8)
            flags = numpy.unpackbits(part, count=length).astype(bool)
            ranks = before + numpy.cumsum(flags, dtype=numpy.int64) - flags
            before += int(numpy.count_nonzero(flags))
            yield flags, ranks

    def dump(self, stop: int) -> bytes:
        """The bits of units before `stop`, as whole bytes."""
        return bytes(self._bits[: -(-stop // 8)])

    def load(self, bits: bytes) -> None:
        """Go back to a dump."""
        self._bits = bytearray(len(self._bits))
        self._bits[: len(bits)] = bits


class Scheme(Protocol):
    """A format of this kind. All lengths are bytes.

    Attributes:
        unit: guest bytes of a unit.
        prefix: what stands before every stored unit.
        units: how many the disk has.
        head_length: where the first unit's prefix begins.
    """

    @property
    def name(self) -> str: ...

    @property
    def unit(self) -> int: ...

    @property
    def prefix(self) -> bytes: ...

    @property
    def units(self) -> int: ...

    @property
    def head_length(self) -> int: ...

    def head(self, stored: StoredUnits, birth: Birth) -> Iterator[bytes | int]:
        """Header and tables from image offset 0 on: bytes, or how many zeros. What is missing to the head is zero."""
        ...

    def tail(self, birth: Birth) -> bytes:
        """What stands behind the last unit."""
        ...


@dataclass(frozen=True, slots=True)
class Stretches:
    """A block, and the (start, stop) stretches of its data that have to be stored, ascending. Owns `data`."""

    offset: int
    length: int
    data: Slice | None = None
    stretches: Sequence[tuple[int, int]] = ()


class AllocatingEncoder:
    """Append units in guest order; a unit begins as soon as a window brings data for it."""

    def __init__(self, scheme: Scheme, context: StageContext, *, reproducible: bool) -> None:
        self._scheme = scheme
        self._window = context.window
        self._disk_size = context.disk_size
        # A window that is no multiple of the grain (tests, odd sources) is cut into what divides it.
        self._grain = min(GRAIN, scheme.unit, context.window & -context.window or GRAIN)
        self._birth = Birth.of(reproducible, context)
        self._cursor = Cursor(scheme.head_length, context.disk_size)
        self._stored = StoredUnits(scheme.units)
        # Guest offset up to which the last unit that was begun is filled; at its end none is open.
        self._filled = 0

    @property
    def position(self) -> int:
        """Image offset behind the last byte placed."""
        return self._cursor.position

    @property
    def identity(self) -> str:
        """A digest of all that shapes the image besides the disk."""
        scheme = self._scheme
        return identify(
            encoder=f"{scheme.name} 1",
            unit=scheme.unit,
            head_length=scheme.head_length,
            disk_size=self._disk_size,
            window=self._window,
            grain=self._grain,
            birth=self._birth.shape,
        )

    def prepare(self, block: Block, charge: Charge | None) -> Stretches:
        """Find what has to be stored. Threads: any; keeps the block's slice, gives `charge` back."""
        if charge is not None:
            charge.release()
        if block.data is None:
            return Stretches(block.offset, block.length)
        grain = self._grain
        touched = touched_grains(block.runs, block.offset, grain)
        if not touched:
            block.release()
            return Stretches(block.offset, block.length)
        stretches = [(first * grain, min(stop * grain, block.length)) for first, stop in touched]
        return Stretches(block.offset, block.length, block.data, stretches)

    def place(self, prepared: Stretches) -> list[Piece]:
        """Append a block's data to its units, without copying it. The caller owns the pieces.

        Raises:
            StageError: the blocks don't come in guest order.
        """
        placed: list[Piece] = []
        data = prepared.data
        try:
            self._cursor.enter(prepared.offset)
            if data is not None:
                for start, stop in prepared.stretches:
                    self._store(prepared.offset, start, stop, data, placed)
        finally:
            if data is not None:
                data.release()
        return self._cursor.leave(prepared.length, placed)

    @property
    def _missing(self) -> int:
        """How much of the open unit is not written yet."""
        return -self._filled % self._scheme.unit

    def _store(self, base: int, start: int, stop: int, data: Slice, placed: list[Piece]) -> None:
        unit, prefix = self._scheme.unit, self._scheme.prefix
        while start < stop:
            first = (base + start) // unit
            # Neighbouring units are one piece where nothing stands between them.
            end = min(stop, (first + 1) * unit - base) if prefix else stop
            if not (self._missing and self._filled // unit == first):
                placed += self._close()
                self._filled = first * unit
                if prefix:
                    placed.append(self._cursor.put(prefix, len(prefix)))
            self._stored.add(first, -(-(base + end) // unit))
            placed += self._cursor.zeros(base + start - self._filled)
            placed.append(self._cursor.put(data.share(start, end), end - start))
            self._filled = base + end
            start = end

    def _close(self) -> Iterator[Piece]:
        """The zeros that an open unit ends with: written when the next one begins."""
        missing = self._missing
        self._filled += missing
        yield from self._cursor.zeros(missing)

    def finish(self) -> Iterator[Piece]:
        """The rest of the last unit, what the format ends with, then the head.

        Raises:
            StageError: the blocks ended before the disk.
        """
        self._cursor.check_end()
        for piece in self._finish():
            yield self._cursor.settle(piece)

    def _finish(self) -> Iterator[Piece]:
        yield from self._close()
        tail = self._scheme.tail(self._birth)
        if tail:
            yield self._cursor.put(tail, len(tail))
        offset = 0
        zeros = 0
        for part in self._scheme.head(self._stored, self._birth):
            if isinstance(part, int):
                zeros += part
                continue
            if zeros:
                yield Piece(offset, zeros, None, 0)
                offset, zeros = offset + zeros, 0
            yield Piece(offset, len(part), part, 0)
            offset += len(part)
        if offset < self._scheme.head_length:
            yield Piece(offset, self._scheme.head_length - offset, None, 0)

    def checkpoint(self) -> bytes:
        """All of the state: positions, and a bit for every unit so far. Compressed."""
        note = {"cursor": self._cursor.dump(), "filled": self._filled, "birth": self._birth.dump()}
        return pack_state(self.identity, note, [self._stored.dump(-(-self._cursor.guest // self._scheme.unit))])

    def restore(self, state: bytes) -> None:
        """Go back to a checkpoint.

        Raises:
            PlanError: it is damaged, or was made with other options or for another disk.
        """
        note, (bits,) = unpack_state(self.identity, state)
        self._cursor.load(note["cursor"])
        self._filled = note["filled"]
        self._birth = self._birth.load(note["birth"])
        self._stored.load(bits)
