"""What an export takes of a disk: the cut, the map of used blocks, and how they look as runs of the virtual disk.

In each other's order: up to `copied` the map decides; dropped partitions read as zero; overlays (the table that fits
the cut) win over both; what follows up to `size` is padding.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from pipeline.errors import PlanError
from pipeline.flow.items import Content, RangeReader, Run, Why
from pipeline.flow.stage import Rounding
from pipeline.units import MiB, format_exact, format_size
from stages.disk.cuts import Cut, Overlay, cut_disk
from stages.disk.mapping import DiskMap, Region, map_disk
from stages.disk.occupancy import Use
from stages.disk.reading import CachedReader
from stages.disk.signatures import identify
from stages.disk.tables import Partition, PartitionTable, read_table
from stages.disk.usage import Refusal

if TYPE_CHECKING:
    from stages.disk.closure import Closure


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What a user wants of a disk. At most one of `partitions`, `needed`, `through` and `stop`; none: all of it.

    Attributes:
        partitions: numbers to keep.
        needed: keep what the system on the disk needs to start.
        through: keep everything up to the end of this partition.
        stop: keep [0, stop) bytes.
        only_used: blocks that a filesystem does not use are left out.
    """

    partitions: tuple[int, ...] | None = None
    needed: bool = False
    through: int | None = None
    stop: int | None = None
    only_used: bool = True

    @property
    def is_cut(self) -> bool:
        """Whether anything is left out but free blocks."""
        return self.needed or self.partitions is not None or self.through is not None or self.stop is not None


async def select(
    reader: RangeReader,
    wanted: Wanted,
    *,
    sector_size: int | None = None,
    uses: Collection[Use] = (),
    hold: Callable[[PartitionTable, Cut | None], Awaitable[Collection[str]]] | None = None,
    rounding: Rounding | None = None,
    large_sectors: bool = False,
    path: Path | None = None,
) -> Selection:
    """Look at a disk and decide what is taken of it.

    Args:
        sector_size: as the device says; None for an image.
        uses: who uses the disk now.
        hold: called when the cut is known and before blocks are looked up; the devices of those uses whose filesystem
            holds still from then on.
        rounding: what the target wants of the size of the virtual disk.
        path: of a disk or file on this machine, which may run from it.
        large_sectors: also a disk that no guest with sectors of 512 bytes could read.
    Raises:
        PlanError: the cut is not possible, or nobody could read the result.
        StoreError, SourceError: the disk can't be read.
    """
    size = reader.size
    cached = CachedReader(reader)
    table = await read_table(cached, size, sector_size=sector_size)
    if wanted.only_used and not large_sectors:
        _refuse_large_sectors(table)
    cut = None
    partitions = wanted.partitions
    closure = await _closure(cached, table, path) if wanted.is_cut else None
    if wanted.needed:
        from stages.disk.closure import needed_partitions

        partitions = needed_partitions(closure)
    if wanted.is_cut or (rounding is not None and rounding.round(size) != size):
        cut = cut_disk(
            table,
            partitions=partitions,
            through=wanted.through,
            stop=wanted.stop,
            alignment=rounding.alignment if rounding else MiB,
            size_min=rounding.minimum if rounding else 0,
        )
        from stages.disk.closure import check_cut

        check_cut(closure, cut.kept)
        if not table.partitions:
            await _check_whole(cached, cut)
    frozen = await hold(table, cut) if hold is not None else ()
    found = None
    if wanted.only_used:
        found = await map_disk(
            reader,  # not what was kept of it: a filesystem may have come to rest since
            size,
            table=table,
            unmapped=why_unmapped(table, uses, cut, frozen),
            frozen={
                number for use in uses if use.device and use.device in frozen for number in used_partitions(table, use)
            },
        )
    return Selection(
        size=cut.size if cut else size,
        copied=cut.copied if cut else size,
        overlays=cut.overlays if cut else (),
        skipped=cut.skipped if cut else (),
        table=table,
        map=found,
        cut=cut,
    )


async def _closure(reader: RangeReader, table: PartitionTable, path: Path | None) -> Closure | None:
    """What the system on the disk needs, running or not; None where there is none, or nothing is known of it."""
    if not table.partitions:
        return None
    from stages.disk.closure import live_closure, offline_closure, signatures_of

    signatures = await signatures_of(reader, table)
    live = live_closure(path, table, signatures) if path is not None else None
    return live or await offline_closure(reader, table, signatures)


async def _check_whole(reader: RangeReader, cut: Cut) -> None:
    """See that a cut of a disk without partitions leaves what fills the disk as it is. Raises PlanError."""
    if cut.copied >= reader.size:
        return
    found = await identify(reader, 0, reader.size)
    if found.kind == "unknown" or (found.size is not None and found.size <= cut.copied):
        return
    whole = f"it has {found.size} bytes" if found.size is not None else "it may use every byte of the disk"
    raise PlanError(
        f"the cut at byte {cut.copied} goes through the {found.kind} that fills the disk",
        operation="cut",
        hint=f"There is no partition table, and {whole}. Export the whole disk, or shrink what is on it first.",
    )


def _refuse_large_sectors(table: PartitionTable) -> None:
    """A table counts sectors of the disk; a guest whose disk has smaller ones looks for everything in other places."""
    if table.sector_size == 512 or not table.partitions:
        return
    raise PlanError(
        f"the disk has sectors of {table.sector_size} bytes, and no cloud's virtual disk has",
        operation="plan",
        hint="Its partition table counts in them: a guest with sectors of 512 bytes finds no partition. Move the "
        'partitions to a disk with sectors of 512 bytes; or set blocks = "all" for an exact copy, which a guest '
        "reads only from a disk with such sectors.",
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Selection:
    """What is taken of a disk. Offsets are bytes; those of the disk and of the virtual disk are the same.

    Attributes:
        size: of the virtual disk.
        copied: it takes [0, copied) from the disk.
        overlays: ascending, without overlap.
        map: None where every block is copied.
        cut: None where the disk is taken as it is.
    """

    size: int
    copied: int
    table: PartitionTable
    overlays: tuple[Overlay, ...] = ()
    skipped: tuple[tuple[int, int], ...] = ()
    map: DiskMap | None = None
    cut: Cut | None = None
    _facts: dict[int, Region] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        for region in self.map.regions if self.map else ():
            if region.kind != "gap":
                self._facts[region.partition.number if region.partition else 0] = region

    @property
    def used_bytes(self) -> int:
        """Bytes that are read from the disk."""
        return self.taken_between(0, self.copied)

    def taken_between(self, start: int, stop: int) -> int:
        """Bytes of [start, stop) that are read from the disk."""
        start, stop = min(start, self.copied), min(stop, self.copied)
        left_out = ((max(start, offset), min(stop, offset + length)) for offset, length in self.skipped)
        return self._used(start, stop) - sum(self._used(begin, end) for begin, end in left_out if begin < end)

    def _used(self, start: int, stop: int) -> int:
        return self.map.used_between(start, stop) if self.map else stop - start

    def runs(self, start: int = 0) -> Iterator[Run]:
        """Tile [start, size), without the overlays."""
        if start < self.copied:
            whole = Run(start, self.copied - start, Content.DATA, Why.READ)
            taken = self.map.runs(start, self.copied) if self.map else iter((whole,))
            dropped = [Run(offset, length, Content.ZERO, Why.FREE) for offset, length in self.skipped]
            yield from replaced(taken, dropped)
        if max(start, self.copied) < self.size:
            begin = max(start, self.copied)
            yield Run(begin, self.size - begin, Content.ZERO, Why.PAD)

    def with_overlays(self, runs: Iterable[Run]) -> Iterator[Run]:
        """The runs, with data wherever the image holds other bytes than the disk."""
        return replaced(
            runs, [Run(one.offset, len(one.data), Content.DATA, Why.READ) for one in self.overlays if one.data]
        )

    def patch(self, offset: int, buffer: memoryview) -> None:
        """Put the overlays into bytes of the virtual disk that begin at `offset`. Threads: any."""
        end = offset + buffer.nbytes
        for one in self.overlays:
            begin, stop = max(one.offset, offset), min(one.end, end)
            if begin < stop:
                buffer[begin - offset : stop - offset] = one.data[begin - one.offset : stop - one.offset]

    # -- what to tell --------------------------------------------------------------------------------------------------

    @property
    def identity(self) -> dict[str, str]:
        """What has to be the same when another process goes on: where it is not, the disk is compared as a whole."""
        found = {}
        if self.map is not None:
            found["map"] = self.map.digest()
            found["state"] = self.map.state()
        if self.cut is not None:
            made = xxhash.xxh3_128(f"{self.size} {self.copied} {self.skipped}".encode())
            for one in self.overlays:
                made.update(one.offset.to_bytes(8, "little") + one.data)
            found["cut"] = f"xxh3-128:{made.hexdigest()}"
        return found

    def is_taken(self, partition: Partition) -> bool:
        """Whether the cut keeps it."""
        return self.cut is None or partition.is_extended or partition.number in self.cut.kept

    def summary(self) -> Iterator[tuple[str, str]]:
        """(what, how much and why) for people, a line for each partition and each gap with something to say."""
        if self.cut is not None:
            kept = ", ".join(map(str, self.cut.kept)) or "none"
            dropped = f"; left out: {', '.join(map(str, self.cut.dropped))}" if self.cut.dropped else ""
            yield "cut", f"{format_exact(self.size)}: partitions {kept}{dropped}"
        for one in sorted(self.table.partitions, key=lambda part: part.start):
            if not one.is_extended:
                yield f"partition {one.number}", self._told(one.number, one)
        if 0 in self._facts and not self.table.partitions and self.map is not None:
            yield "no partitions", self._told(0, None)
        for region in self.map.regions if self.map else ():
            if region.kind == "gap" and region.reason and region.offset < self.copied:
                yield f"gap at {region.offset}", f"{format_size(region.length)}, {region.reason}"
        for problem in self.table.problems:
            yield "table", problem

    def _told(self, number: int, partition: Partition | None) -> str:
        region = self._facts.get(number)
        length = partition.length if partition else self.size
        name = _name(region, partition)
        if partition is not None and not self.is_taken(partition):
            return f"{name}, {format_size(length)}: left out"
        if region is None:
            return f"{name}, {format_size(length)}: every block is copied"
        if isinstance(region.outcome, Refusal):
            return f"{name}, {format_size(length)}: copied whole, because {region.outcome.reason}"
        notes = f" ({'; '.join(region.outcome.notes)})" if region.outcome and region.outcome.notes else ""
        return f"{name}, {format_size(region.copied)} of {format_size(length)} are used{notes}"

    def partitions(self) -> list[dict[str, Any]]:
        """The fact "partitions" of the manifest."""
        found = []
        for one in self.table.partitions:
            region = self._facts.get(one.number)
            signature = region.signature if region else None
            told: dict[str, Any] = {
                "number": one.number,
                "start": one.start,
                "length": one.length,
                "type": one.type_name,
                "name": one.name,
                "uuid": one.uuid,
                "filesystem": signature.kind if signature and signature.kind != "unknown" else "",
                "label": signature.label if signature else "",
                "filesystem_uuid": signature.uuid if signature else "",
                "taken": self.is_taken(one),
            }
            if region is not None and told["taken"]:
                told["copied"] = region.copied
                if isinstance(region.outcome, Refusal):
                    told["why"] = region.outcome.reason
            found.append(told)
        return found


def _name(region: Region | None, partition: Partition | None) -> str:
    kind = region.signature.kind if region and region.signature else ""
    label = region.signature.label if region and region.signature else ""
    known = kind if kind not in ("", "unknown") else partition.type_name if partition else "unknown"
    return f'{known} "{printable(label)}"' if label else known


def printable(text: str) -> str:
    """What a disk says is shown, but never acts on a terminal."""
    return "".join(char if char.isprintable() else "?" for char in text)


def replaced(runs: Iterable[Run], others: Iterable[Run]) -> Iterator[Run]:
    """Ascending runs, with `others` (ascending too) in place of what they cover; together they tile what `runs` did."""
    rest = iter(others)
    other = next(rest, None)
    for run in runs:
        position = run.offset
        while position < run.end:
            while other is not None and other.end <= position:
                other = next(rest, None)
            if other is None or other.offset >= run.end:
                yield Run(position, run.end - position, run.content, run.why)
                break
            if other.offset > position:
                yield Run(position, other.offset - position, run.content, run.why)
                position = other.offset
            stop = min(run.end, other.end)
            yield Run(position, stop - position, other.content, other.why)
            position = stop


def used_partitions(table: PartitionTable, use: Use) -> set[int]:
    """Numbers of the partitions that a use is of; 0 for a disk without a table.

    A loop device over one partition often reaches to the end of its file: it is of the one that begins where it does.
    """
    real = [one for one in table.partitions if not one.is_extended]
    if not real:
        return {0}
    exact = {one.number for one in real if one.start == use.offset}
    return exact or {one.number for one in real if use.touches(one.start, one.length)}


def why_unmapped(
    table: PartitionTable, uses: Collection[Use], cut: Cut | None, frozen: Collection[str] = ()
) -> dict[int, str]:
    """Why nobody may trust the map of a partition, by its number: it changes while it is read, or is left out.

    Args:
        frozen: devices whose filesystem is frozen.
    """
    found: dict[int, str] = {}
    for use in uses:
        if use.kind == "swap" or not use.writable or use.device in frozen:
            continue
        for number in used_partitions(table, use):
            found.setdefault(
                number,
                f"it is mounted read-write at {printable(use.point)}"
                if use.kind == "mount"
                else f"it is in use by {printable(use.point)}",
            )
    for number in cut.dropped if cut is not None else ():
        found[number] = "it is left out"
    return found
