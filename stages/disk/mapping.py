"""The map of a whole disk: partitions, the gaps between them, and the partition table itself.

What no filesystem vouches for is copied. The image of a mapped disk equals the disk with its free blocks read as zero.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import xxhash

from pipeline.flow.items import Content, RangeReader, Run, Why
from pipeline.units import MiB
from stages.disk.filesystems import map_filesystem, map_physical_volumes
from stages.disk.reading import CachedReader, Window
from stages.disk.signatures import Signature, identify
from stages.disk.tables import Partition, PartitionTable, overlapping, read_table
from stages.disk.usage import Numbers, RangeSet, Refusal, UsedMap, invert, still_holds

# Boot loaders live in front of the first partition: GRUB in the first MiB, those of ARM boards up to 16 MiB.
BOOT_AREA = 32 * MiB
# A gap this small is copied unseen. A larger one is looked at, at both ends.
GAP_COPIED = 4 * MiB
_GAP_PROBE = MiB
# Runs made of the arrays at a time.
_RUNS_AT_ONCE = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Region:
    """A part of the disk and what is copied of it. `offset` and `length` are bytes of the disk.

    Attributes:
        kind: `disk` where there is no partition table and the whole disk is one filesystem, or nothing known.
        copied: bytes of it that are copied.
        outcome: of a partition or disk: its map, or why all of it is copied.
        reason: why a gap is copied or not.
    """

    kind: Literal["partition", "gap", "disk"]
    offset: int
    length: int
    copied: int
    partition: Partition | None = None
    signature: Signature | None = None
    outcome: UsedMap | Refusal | None = None
    reason: str = ""

    @property
    def name(self) -> str:
        """What to call it in a report."""
        if self.partition is not None:
            return f"partition {self.partition.number}"
        return "the disk" if self.kind == "disk" else f"the gap at byte {self.offset}"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DiskMap:
    """Which bytes of a disk an export copies.

    Attributes:
        regions: ascending; partitions that overlap are there one after the other.
        starts, lengths: what is copied, ascending and apart. Bytes.
        swaps: (offset, length) inside of which what is not copied is swap.
    """

    size: int
    table: PartitionTable
    regions: tuple[Region, ...]
    starts: Numbers
    lengths: Numbers
    swaps: tuple[tuple[int, int], ...]

    @property
    def used_bytes(self) -> int:
        """Bytes that are copied."""
        return int(self.lengths.sum())

    def used_between(self, start: int, stop: int) -> int:
        """Bytes of [start, stop) that are copied."""
        ends = np.clip(self.starts + self.lengths, start, stop)
        return int((ends - np.clip(self.starts, start, stop)).sum())

    def runs(self, start: int = 0, stop: int | None = None) -> Iterator[Run]:
        """Tile [start, stop) of the disk: what is copied, and what is free or swap and reads as zero."""
        stop = self.size if stop is None else stop
        position = start
        first = max(0, int(np.searchsorted(self.starts, start, side="right")) - 1)
        for at in range(first, len(self.starts), _RUNS_AT_ONCE):
            part = slice(at, at + _RUNS_AT_ONCE)
            for offset, length in zip(self.starts[part].tolist(), self.lengths[part].tolist(), strict=True):
                begin, end = max(offset, position), min(offset + length, stop)
                if begin >= end:
                    continue
                yield from self._skips(position, begin)
                yield Run(begin, end - begin, Content.DATA, Why.READ)
                position = end
                if position >= stop:
                    return
        yield from self._skips(position, stop)

    def _skips(self, position: int, stop: int) -> Iterator[Run]:
        for offset, length in self.swaps:
            begin, end = max(offset, position), min(offset + length, stop)
            if begin >= end:
                continue
            if begin > position:
                yield Run(position, begin - position, Content.ZERO, Why.FREE)
            yield Run(begin, end - begin, Content.ZERO, Why.SWAP)
            position = end
        if position < stop:
            yield Run(position, stop - position, Content.ZERO, Why.FREE)

    def reasons(self) -> tuple[tuple[str, str], ...]:
        """(name, why) of everything that is copied whole, and of every gap that is not copied."""
        found = []
        for region in self.regions:
            if isinstance(region.outcome, Refusal):
                found.append((region.name, f"copied whole: {region.outcome.reason}"))
            elif isinstance(region.outcome, UsedMap):
                found += [(region.name, note) for note in region.outcome.notes]
            elif region.reason:
                found.append((region.name, region.reason))
        return tuple(found)

    def digest(self) -> str:
        """A hash of what is copied, the same on every machine. For the manifest."""
        made = xxhash.xxh3_128(self.size.to_bytes(8, "little"))
        for array in (self.starts, self.lengths):
            made.update(np.ascontiguousarray(array, "<i8").tobytes())
        return f"xxh3-128:{made.hexdigest()}"

    def state(self) -> str:
        """A hash of every superblock that was believed: another one after the filesystem was written to."""
        made = xxhash.xxh3_128()
        for region in self.regions:
            if isinstance(region.outcome, UsedMap):
                made.update(region.offset.to_bytes(8, "little") + region.outcome.witness.digest)
        return f"xxh3-128:{made.hexdigest()}"

    async def still_holds(self, reader: RangeReader) -> bool:
        """Whether every superblock that was believed reads as it did. `reader` must not answer from a cache."""
        for region in self.regions:
            if isinstance(region.outcome, UsedMap):
                window = Window(reader, region.offset, region.length)
                if not await still_holds(window, region.outcome.witness):
                    return False
        return True


async def map_disk(
    reader: RangeReader,
    size: int,
    *,
    sector_size: int | None = None,
    frozen: Collection[int] = (),
    unmapped: Mapping[int, str] | None = None,
    table: PartitionTable | None = None,
) -> DiskMap:
    """Find out which bytes of a disk have to be copied.

    Args:
        size: of the disk in bytes.
        sector_size: as `read_table` takes it.
        frozen: numbers of partitions whose filesystem is frozen; 0 for a disk without a table.
        unmapped: numbers of partitions whose map nobody may trust, and why, half a sentence: all of them is copied.
        table: where it was read already.
    Raises:
        StoreError: the disk can't be read.
    """
    cached = CachedReader(reader)
    unmapped = unmapped or {}
    if table is None:
        table = await read_table(cached, size, sector_size=sector_size)
    ranges = RangeSet(size)
    for offset, length in table.metadata:
        ranges.add(offset, length)
    if table.kind in ("none", "protective"):
        regions = [await _map_unpartitioned(cached, size, table, 0 in frozen, unmapped)]
    else:
        regions = await _map_partitions(cached, size, table, frozen, unmapped)
        regions += await _map_gaps(cached, size, table, regions, ranges)
        regions.sort(key=lambda region: (region.offset, region.length))
    for region in regions:
        if isinstance(region.outcome, UsedMap):
            starts = region.outcome.starts + region.offset
            ranges.add_many(starts, starts + region.outcome.lengths)
        elif region.kind != "gap":
            ranges.add(region.offset, region.length)
    starts, lengths = ranges.finish()
    swaps = [
        (region.offset, region.length)
        for region in regions
        if isinstance(region.outcome, UsedMap) and region.outcome.free is Why.SWAP
    ]
    return DiskMap(
        size=size, table=table, regions=tuple(regions), starts=starts, lengths=lengths, swaps=tuple(sorted(swaps))
    )


async def _map_unpartitioned(
    reader: RangeReader, size: int, table: PartitionTable, frozen: bool, unmapped: Mapping[int, str]
) -> Region:
    signature = await identify(reader, 0, size)
    outcome: UsedMap | Refusal
    if table.kind == "protective":
        outcome = Refusal(signature.kind, "its partition table can't be read")
    elif unmapped:
        outcome = Refusal(signature.kind, next(iter(unmapped.values())))
    else:
        outcome = await map_filesystem(reader, 0, size, frozen=frozen, signature=signature)
    return Region(
        kind="disk", offset=0, length=size, copied=_copied(outcome, size), signature=signature, outcome=outcome
    )


async def _map_partitions(
    reader: RangeReader, size: int, table: PartitionTable, frozen: Collection[int], unmapped: Mapping[int, str]
) -> list[Region]:
    """One region for each partition that holds anything; physical volumes are mapped together."""
    parts = [one for one in table.partitions if not one.is_extended and one.start < size]
    shared = overlapping(parts)
    regions: list[Region] = []
    volumes: list[int] = []
    for one in parts:
        length = min(one.end, size) - one.start
        outcome: UsedMap | Refusal
        # A hostile table can lay thousands of partitions over each other; nobody looks into those.
        is_alone = one.number not in shared
        signature = await identify(reader, one.start, length) if is_alone else Signature(kind="unknown")
        if not is_alone:
            outcome = Refusal(signature.kind, "it overlaps another partition")
        elif one.end > size:
            outcome = Refusal(signature.kind, "it ends behind the end of the disk")
        elif one.number in unmapped:
            outcome = Refusal(signature.kind, unmapped[one.number])
        elif signature.kind == "lvm2":
            outcome = Refusal("lvm2", "")
            volumes.append(len(regions))
        else:
            outcome = await map_filesystem(reader, one.start, length, frozen=one.number in frozen, signature=signature)
        regions.append(
            Region(
                kind="partition",
                offset=one.start,
                length=length,
                copied=_copied(outcome, length),
                partition=one,
                signature=signature,
                outcome=outcome,
            )
        )
    if volumes:
        windows = [Window(reader, regions[index].offset, regions[index].length) for index in volumes]
        every = all(
            part is not None and part.number in frozen for part in (regions[index].partition for index in volumes)
        )
        for index, outcome in zip(volumes, await map_physical_volumes(windows, frozen=every), strict=True):
            regions[index] = replace(regions[index], outcome=outcome, copied=_copied(outcome, regions[index].length))
    return regions


def _copied(outcome: UsedMap | Refusal, length: int) -> int:
    return outcome.used_bytes if isinstance(outcome, UsedMap) else length


async def _map_gaps(
    reader: RangeReader, size: int, table: PartitionTable, regions: list[Region], ranges: RangeSet
) -> list[Region]:
    """The stretches of no partition; adds what is copied of them to `ranges`."""
    covered = RangeSet(size)
    for region in regions:
        covered.add(region.offset, region.length)
    starts, lengths = covered.finish()
    made = []
    for offset, length in zip(*(array.tolist() for array in invert(starts, lengths, size)), strict=True):
        reason, copied = await _look_at_gap(reader, table, offset, length)
        ranges.add(offset, copied)
        made.append(Region(kind="gap", offset=offset, length=length, copied=copied, reason=reason))
    return made


async def _look_at_gap(reader: RangeReader, table: PartitionTable, offset: int, length: int) -> tuple[str, int]:
    """(why, bytes to copy from its begin)."""
    if length <= GAP_COPIED:
        return "", length
    if table.problems:
        return "copied: the partition table is damaged, something may be here", length
    if offset == 0:
        kept = min(length, BOOT_AREA)
        return ("not copied behind the boot area: no partition" if kept < length else ""), kept
    for begin in (offset, offset + length - _GAP_PROBE):
        data = bytearray(await reader.read(begin, _GAP_PROBE))
        for start, count in table.metadata:
            first, last = max(0, start - begin), min(len(data), start + count - begin)
            if first < last:
                data[first:last] = bytes(last - first)
        if any(data):
            return "copied: no partition, but not empty", length
    return "not copied: no partition, and empty at both ends", 0
