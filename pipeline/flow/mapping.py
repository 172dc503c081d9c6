"""The map of a run: which guest ranges were data, which were zero, and why; and the map made before one."""

from __future__ import annotations

import hashlib
import struct
from array import array
from collections.abc import Iterator
from typing import TYPE_CHECKING

from pipeline.flow.facts import Fact
from pipeline.flow.items import Block, Content, Run, Why

if TYPE_CHECKING:
    import numpy

SKIPPED_RANGES: Fact[tuple[range, ...]] = Fact("skipped ranges", tuple)

# A run costs 9 bytes; a million of them cover the worst disks seen. Beyond it, runs are merged by window.
_RUNS_MAX = 1_000_000
_WHYS = tuple(Why)
_TOTALS = struct.Struct(f"<{len(_WHYS)}Q")
_RUN = struct.Struct("<QB")


class MapRecorder:
    """Collects the runs of every block, in order, merged where neighbours are alike."""

    def __init__(self) -> None:
        self._lengths = array("Q")
        self._whys = array("B")
        self.totals = dict.fromkeys(Why, 0)
        self._noted = (0, 0)  # runs, and bytes of the last of them, that `delta` gave already

    def observe(self, block: Block) -> None:
        """Add the runs of the next block."""
        for run in block.runs:
            self.totals[run.why] += run.length
            self._add(run.length, _WHYS.index(run.why))

    def _add(self, length: int, why: int) -> None:
        if self._whys and (self._whys[-1] == why or len(self._whys) >= _RUNS_MAX):
            self._lengths[-1] += length
        else:
            self._lengths.append(length)
            self._whys.append(why)

    def delta(self) -> bytes:
        """The totals, and the runs since the last call."""
        count, length = self._noted
        first = max(0, count - 1)
        parts = [_TOTALS.pack(*self.totals.values())]
        for index in range(first, len(self._whys)):
            fresh = self._lengths[index] - (length if count and index == first else 0)
            if fresh:
                parts.append(_RUN.pack(fresh, self._whys[index]))
        if self._whys:
            self._noted = (len(self._whys), self._lengths[-1])
        return b"".join(parts)

    def recall(self, delta: bytes) -> None:
        """Add what `delta` gave."""
        self.totals = dict(zip(_WHYS, _TOTALS.unpack_from(delta), strict=True))
        for length, why in _RUN.iter_unpack(delta[_TOTALS.size :]):
            self._add(length, why)

    def become(self, other: MapRecorder) -> None:
        """Take over what another one collected in a further look at the whole disk."""
        self._lengths, self._whys, self.totals = other._lengths, other._whys, other.totals

    @property
    def is_exact(self) -> bool:
        """False once runs had to be merged because there were too many."""
        return len(self._whys) < _RUNS_MAX

    @property
    def read_bytes(self) -> int:
        """Guest bytes that were read from the source."""
        return self.totals[Why.READ] + self.totals[Why.SCANNED]

    def runs(self) -> Iterator[Run]:
        """The merged runs, in guest order."""
        offset = 0
        for length, code in zip(self._lengths, self._whys, strict=True):
            why = _WHYS[code]
            yield Run(offset, length, Content.DATA if why is Why.READ else Content.ZERO, why)
            offset += length

    def skipped(self) -> tuple[range, ...]:
        """Ranges that were never read but should read as zero from the source too: holes."""
        return tuple(range(run.offset, run.end) for run in self.runs() if run.why is Why.HOLE)


# Units looked at in one go: 1 MiB of flags, however large the disk.
_UNITS_AT_ONCE = 1 << 20


class DataMap:
    """One bit for every unit of the disk: whether it holds data. Made before a run that needs to know (a map pass).

    Args:
        unit: guest bytes of a unit; the last one may be shorter.
        size: guest bytes of the disk.
    """

    def __init__(self, unit: int, size: int) -> None:
        self.unit = unit
        self.size = size
        self.units = -(-size // unit)
        self._bits = bytearray(-(-self.units // 8))

    def add(self, start: int, stop: int) -> None:
        """The guest bytes [start, stop) hold data: mark every unit that they touch."""
        first, last = start // self.unit, -(-stop // self.unit)
        bits = self._bits
        while first < last and first % 8:
            bits[first >> 3] |= 0x80 >> (first & 7)
            first += 1
        whole = max(0, last - first) // 8
        bits[first >> 3 : (first >> 3) + whole] = b"\xff" * whole
        for unit in range(first + 8 * whole, last):
            bits[unit >> 3] |= 0x80 >> (unit & 7)

    def flags(self, first: int, stop: int) -> numpy.ndarray:
        """One flag for each unit in [first, stop)."""
        import numpy

        packed = numpy.frombuffer(self._bits, numpy.uint8, -(-stop // 8) - first // 8, first // 8)
        return numpy.unpackbits(packed)[first % 8 : first % 8 + stop - first].astype(bool)

    def batches(self) -> Iterator[tuple[int, numpy.ndarray]]:
        """(first unit, flags) over the whole disk, so many at once that memory stays small."""
        for first in range(0, self.units, _UNITS_AT_ONCE):
            yield first, self.flags(first, min(first + _UNITS_AT_ONCE, self.units))

    def stretches(self, first: int, stop: int) -> Iterator[tuple[int, int]]:
        """(first, stop) of the units with data in [first, stop), ascending; long ones may come in parts."""
        import numpy

        for start in range(first, stop, _UNITS_AT_ONCE):
            flags = self.flags(start, min(start + _UNITS_AT_ONCE, stop))
            edges = numpy.flatnonzero(numpy.diff(flags, prepend=False, append=False))
            for low, high in edges.reshape(-1, 2).tolist():
                yield start + low, start + high

    def count(self) -> int:
        """How many units hold data."""
        return sum(int(flags.sum()) for _, flags in self.batches())

    @property
    def identity(self) -> str:
        """A digest of the whole map."""
        return hashlib.sha256(f"{self.unit} {self.size}\n".encode() + self._bits).hexdigest()
