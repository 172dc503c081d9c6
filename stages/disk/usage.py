"""Used-block maps: which bytes of a filesystem hold anything, or why nobody may say."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import xxhash
from numpy.typing import NDArray

from pipeline.flow.items import RangeReader, Why

Numbers = NDArray[np.int64]

# Ranges kept at most, 16 bytes each. A filesystem in more pieces has its shortest gaps copied: a larger number costs
# memory, a smaller one copies free space. Sorting holds five times that for a moment.
RANGES_MAX = 1 << 19


@dataclass(frozen=True, slots=True)
class Witness:
    """What a map was made from: these bytes must read the same when it is used."""

    ranges: tuple[tuple[int, int], ...]
    digest: bytes


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class UsedMap:
    """The used ranges of a filesystem or volume. Everything else may read as zero.

    Attributes:
        filesystem: its kind, as in `Signature.kind`.
        size: bytes that the map speaks about (the partition).
        starts, lengths: used ranges in bytes from the partition's begin; ascending, apart, inside `size`.
        unit: bytes of an allocation unit.
        units_used: allocation units in use as the filesystem itself counts them.
        free: why the rest is not copied.
        notes: what was mapped how inside it (the volumes of an LVM).
        witness: reads that tell whether the map still holds.
    """

    filesystem: str
    size: int
    starts: Numbers
    lengths: Numbers
    unit: int
    units_used: int
    free: Why = Why.FREE
    notes: tuple[str, ...] = ()
    witness: Witness = Witness((), b"")

    @property
    def used_bytes(self) -> int:
        """Bytes that have to be copied."""
        return int(self.lengths.sum())

    def ranges(self) -> Iterator[tuple[int, int]]:
        """(offset, length) of every used range, ascending."""
        yield from zip(self.starts.tolist(), self.lengths.tolist(), strict=True)


@dataclass(frozen=True, slots=True)
class Refusal:
    """No map can be trusted, so everything is copied. `reason` is half a sentence: "it is not clean ..."."""

    filesystem: str
    reason: str


@dataclass(slots=True)
class RangeSet:
    """Collects used ranges in any order, in bounded memory."""

    size: int
    _starts: list[Numbers] = field(default_factory=list)
    _stops: list[Numbers] = field(default_factory=list)
    _count: int = 0

    def add(self, offset: int, length: int) -> None:
        """Add one range in bytes."""
        if length > 0:
            self.add_many(np.array([offset], np.int64), np.array([offset + length], np.int64))

    def add_many(self, starts: Numbers, stops: Numbers) -> None:
        """Add ranges in bytes, given by their begins and ends; parts outside of [0, size) are left out."""
        if not len(starts):
            return
        self._starts.append(starts)
        self._stops.append(stops)
        self._count += len(starts)
        if self._count > 2 * RANGES_MAX:
            self._settle()

    def finish(self) -> tuple[Numbers, Numbers]:
        """(starts, lengths): sorted, merged, clipped, RANGES_MAX at most."""
        self._settle()
        starts, stops = self._starts[0], self._stops[0]
        return starts, stops - starts

    def _settle(self) -> None:
        starts = np.concatenate(self._starts) if self._starts else np.zeros(0, np.int64)
        stops = np.concatenate(self._stops) if self._stops else np.zeros(0, np.int64)
        starts, stops = merge(np.clip(starts, 0, self.size), np.clip(stops, 0, self.size))
        if len(starts) > RANGES_MAX:
            gaps = starts[1:] - stops[:-1]
            # The longest gaps stay; with a margin, so that this is not done again after every few ranges.
            keep = RANGES_MAX * 3 // 4
            shortest = np.partition(gaps, len(gaps) - keep)[len(gaps) - keep]
            apart = np.flatnonzero(gaps > shortest)
            starts = starts[np.concatenate(([0], apart + 1))]
            stops = stops[np.concatenate((apart, [len(stops) - 1]))]
        self._starts, self._stops, self._count = [starts], [stops], len(starts)


def merge(starts: Numbers, stops: Numbers) -> tuple[Numbers, Numbers]:
    """Sort ranges and join those that touch or overlap; empty ones go."""
    real = stops > starts
    starts, stops = starts[real], stops[real]
    if not len(starts):
        return starts, stops
    order = np.argsort(starts, kind="stable")
    starts, stops = starts[order], np.maximum.accumulate(stops[order])
    apart = np.flatnonzero(starts[1:] > stops[:-1])
    return starts[np.concatenate(([0], apart + 1))], stops[np.concatenate((apart, [len(stops) - 1]))]


def invert(starts: Numbers, lengths: Numbers, size: int) -> tuple[Numbers, Numbers]:
    """The gaps between sorted ranges inside [0, size), as (starts, lengths)."""
    begins = np.concatenate(([0], starts + lengths)).astype(np.int64)
    ends = np.concatenate((starts, [size])).astype(np.int64)
    real = ends > begins
    return begins[real], (ends - begins)[real]


def set_runs(bits: NDArray[np.uint8]) -> tuple[Numbers, Numbers]:
    """(starts, stops) of the runs of ones in an array of zeros and ones."""
    edges = np.flatnonzero(bits[1:] != bits[:-1]).astype(np.int64) + 1
    if len(bits) and bits[0]:
        edges = np.concatenate((np.zeros(1, np.int64), edges))
    if len(edges) % 2:
        edges = np.concatenate((edges, np.array([len(bits)], np.int64)))
    return edges[0::2], edges[1::2]


async def take_witness(reader: RangeReader, ranges: Iterable[tuple[int, int]]) -> Witness:
    """Note what these ranges hold now."""
    listed = tuple(ranges)
    return Witness(listed, await _digest(reader, listed))


async def still_holds(reader: RangeReader, witness: Witness) -> bool:
    """Whether the bytes that a map was made from are unchanged. `reader` must not answer from a cache."""
    return await _digest(reader, witness.ranges) == witness.digest


async def _digest(reader: RangeReader, ranges: tuple[tuple[int, int], ...]) -> bytes:
    digest = xxhash.xxh3_128()
    for offset, length in ranges:
        digest.update(await reader.read(offset, length))
    return digest.digest()
