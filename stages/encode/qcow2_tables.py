"""The tables of a qcow2 image while it grows: L1, the open L2 tables, reference counts.

Both grow at their end and are written out from their front, so that only what is near the write position is in memory.

Plain Python on purpose: a window has 32 clusters of 64 KiB, and between two windows the codecs empty the caches. So
placing one takes 55 to 80 us, and took 190 to 250 us with array operations. Those win only with clusters of 512 bytes
(0.9 ms against 2.3 ms), where the codec takes 40 ms.

Source: QCOW2 image format, "Host cluster management" and "Cluster mapping".
"""

from __future__ import annotations

import struct
import sys
from array import array
from collections.abc import Iterator, Sequence

from pipeline.errors import StageError
from pipeline.units import round_up
from stages.encode.qcow2_geometry import Geometry

COPIED = 1 << 63  # L1 and plain L2 entries: the reference count is exactly 1
COMPRESSED = 1 << 62
ENTRY = 8  # bytes of an entry of L1, L2 and the refcount table

_put_entry = struct.Struct(">Q").pack_into


class GuestTables:
    """L1, and the L2 tables that are still open: neighbours, in one buffer.

    With clusters of 4 KiB and more a window lies inside one table; smaller ones have several open.
    """

    def __init__(self, geometry: Geometry) -> None:
        self._cluster = geometry.cluster_size  # bytes of a table too
        self._per_table = geometry.l2_entries
        self._sector_shift = geometry.offset_bits
        self._l1 = bytearray(ENTRY * geometry.l1_entries)
        self._l1_used = 0
        self._first_table = 0
        self._open = bytearray()

    def set_plain(self, first: int, stop: int, position: int) -> None:
        """Point guest clusters [first, stop) at neighbouring host clusters from `position` on."""
        count = stop - first
        entries = range(position | COPIED, (position | COPIED) + count * self._cluster, self._cluster)
        struct.pack_into(f">{count}Q", self._open, self._reach(first, stop), *entries)

    def set_compressed(self, base: int, numbers: Sequence[int], sizes: Sequence[int], position: int) -> None:
        """Point guest clusters at streams of these sizes, packed from `position` on.

        Args:
            base: the guest cluster that the ascending `numbers` are counted from.
        """
        shift, table = self._sector_shift, self._open
        start = self._reach(base, base + numbers[-1] + 1)
        for number, size in zip(numbers, sizes, strict=True):
            sectors = (position + size - 1 >> 9) - (position >> 9)
            _put_entry(table, start + ENTRY * number, COMPRESSED | sectors << shift | position)
            position += size

    def take_closed(self, guest_cluster: int) -> Iterator[tuple[int, bytes]]:
        """Forget every open table that ends at or before `guest_cluster`; give those with entries, by L1 index."""
        while self._open and (self._first_table + 1) * self._per_table <= guest_cluster:
            table = bytes(self._open[: self._cluster])
            del self._open[: self._cluster]
            self._first_table += 1
            if table.count(0) != len(table):
                yield self._first_table - 1, table

    def take_all(self) -> Iterator[tuple[int, bytes]]:
        """Close every open table."""
        return self.take_closed(self._first_table * self._per_table + len(self._open) // ENTRY)

    def set_l2(self, index: int, position: int) -> None:
        """Point L1 at an L2 table."""
        _put_entry(self._l1, ENTRY * index, position | COPIED)
        self._l1_used = index + 1

    def l1_bytes(self, start: int, stop: int) -> bytes | None:
        """Bytes [start, stop) of the L1 table, zeros behind its end; None where all of them are zero."""
        part = bytes(self._l1[start:stop])
        return part.ljust(stop - start, b"\0") if part.count(0) != len(part) else None

    def dump(self) -> tuple[int, list[bytes]]:
        """(first open table, [L1, open tables])."""
        return self._first_table, [bytes(self._l1[: ENTRY * self._l1_used]), bytes(self._open)]

    def load(self, first_table: int, parts: Sequence[bytes]) -> None:
        """Go back to a dump."""
        l1, tables = parts
        self._l1 = bytearray(len(self._l1))
        self._l1[: len(l1)] = l1
        self._l1_used = len(l1) // ENTRY
        self._first_table = first_table
        self._open = bytearray(tables)

    def _reach(self, first: int, stop: int) -> int:
        """Make the open tables hold guest clusters [first, stop); give the place of the first one's entry."""
        if not self._open:
            self._first_table = first // self._per_table
        base = self._first_table * self._per_table
        missing = ENTRY * (stop - base) - len(self._open)
        if missing > 0:
            self._open += bytes(round_up(missing, self._cluster))
        return ENTRY * (first - base)


class Refcounts:
    """Reference counts of host clusters, from the first block that is not written yet on.

    Attributes:
        table: image offset of each refcount block that was written.
    """

    def __init__(self, geometry: Geometry) -> None:
        self._cluster_bits = geometry.cluster_bits
        self._per_block = geometry.counts_per_block
        self._kind = "H" if geometry.refcount_bits == 16 else "B"
        self._counts = array(self._kind)
        self.table = array("Q")

    def count(self, first: int, stop: int) -> None:
        """The first reference to each host cluster in [first, stop)."""
        start = self._reach(first, stop)
        self._counts[start : start + stop - first] = array(self._kind, (1,)) * (stop - first)

    def count_streams(self, sizes: Sequence[int], position: int) -> None:
        """One reference more for every host cluster that each stream touches, packed from `position` on.

        A stream is shorter than a cluster, so it touches one or two. Readers fetch whole sectors of 512 bytes, which
        never leave the clusters of their first and last byte.
        """
        bits, counts = self._cluster_bits, self._counts
        first = position >> bits
        shift = self._reach(first, (position + sum(sizes) - 1 >> bits) + 1) - first
        try:
            for size in sizes:
                low, high = position >> bits, position + size - 1 >> bits
                counts[low + shift] += 1
                if high != low:
                    counts[high + shift] += 1
                position += size
        except OverflowError:
            raise StageError("too many compressed clusters share a cluster of the image", offset=position) from None

    def take_passed(self, position: int) -> bytes | None:
        """The first block not yet written, if all that it counts lies before `position`, where it is to be written."""
        passed = (len(self.table) + 1) * self._per_block <= position >> self._cluster_bits
        return self.take_next(position) if passed else None

    def take_next(self, position: int) -> bytes:
        """The first block not yet written, to be written at `position`."""
        first = len(self.table) * self._per_block
        self._reach(first, first + self._per_block)
        block = _big_endian(self._counts[: self._per_block])
        del self._counts[: self._per_block]
        self.table.append(position)
        return block

    def table_bytes(self, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of the refcount table, zeros behind its end."""
        return _big_endian(self.table[start // ENTRY : stop // ENTRY]).ljust(stop - start, b"\0")

    def dump(self, position: int) -> list[bytes]:
        """[refcount table, open counts], of an image that ends at `position`."""
        known = (position >> self._cluster_bits) + 1 - len(self.table) * self._per_block
        return [_big_endian(self.table), _big_endian(self._counts[: max(0, known)])]

    def load(self, parts: Sequence[bytes]) -> None:
        """Go back to a dump."""
        table, counts = parts
        self.table = _from_big_endian("Q", table)
        self._counts = _from_big_endian(self._kind, counts)
        first = len(self.table) * self._per_block
        self._reach(first, first + len(self._counts))

    def _reach(self, first: int, stop: int) -> int:
        """Make the open blocks hold host clusters [first, stop); give the index of the first."""
        base = len(self.table) * self._per_block
        missing = stop - base - len(self._counts)
        if missing > 0:
            whole = round_up(stop - base, self._per_block) - len(self._counts)
            self._counts.frombytes(bytes(whole * self._counts.itemsize))
        return first - base


def _big_endian(numbers: array[int]) -> bytes:
    numbers = numbers[:]
    if sys.byteorder == "little":
        numbers.byteswap()
    return numbers.tobytes()


def _from_big_endian(kind: str, data: bytes) -> array[int]:
    numbers = array(kind, data)
    if sys.byteorder == "little":
        numbers.byteswap()
    return numbers
