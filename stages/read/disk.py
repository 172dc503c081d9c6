"""Read a block device or a raw image file with O_DIRECT: all of it, or the partitions and blocks that are wanted.

Holes of a file are found with SEEK_DATA / SEEK_HOLE (lseek(2)) and not read; nor are blocks that a filesystem does not
use, where that can be trusted (`stages/disk/`). A block device is raw, whatever its first bytes look like. The source
is opened read-only; where the image holds another partition table, it is put into the stream.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import stat
import struct
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import anyio

from pipeline.errors import PlanError, SourceError
from pipeline.events import FallbackTaken
from pipeline.flow.facts import Fact
from pipeline.flow.items import Block, Content, Run, Why
from pipeline.flow.pacing import RATE_MIN, RateLimit
from pipeline.flow.parallel import in_thread
from pipeline.flow.rereading import REREAD
from pipeline.flow.stage import BLOCKS, DISK_SIZE, NOTHING, SourceInfo, StageContext, StageSpec, option
from pipeline.units import Duration, KiB, MiB, Size, round_up

if TYPE_CHECKING:
    from collections.abc import Collection

    from stages.disk.cuts import Cut
    from stages.disk.freezing import Freeze
    from stages.disk.occupancy import Use
    from stages.disk.selection import Selection
    from stages.disk.snapshots import Snapshot
    from stages.disk.tables import PartitionTable

# linux/fs.h
_BLKGETSIZE64 = 0x80081272
_BLKSSZGET = 0x1268
# A gap shorter than this inside a window is read with its neighbours: one request costs more than the bytes.
_GAP_READ_ANYWAY = 128 * KiB
# A disk that is never at rest would be read for ever.
_REREADS_MAX = 100
# How many runs of the map are looked up in one thread call; each costs a system call or two.
_RUNS_AT_ONCE = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Options of read.disk."""

    path: Path = option(doc="Block device or raw image file.", example="/dev/sda", may_change=True)
    partitions: Literal["all", "needed"] | tuple[int, ...] = option(
        "all",
        doc="Partitions to keep, as [1, 2]; needed keeps those that the system on it needs to start: root, "
        "/boot, the EFI partition, /home, what fstab mounts. The partition table of the image fits them.",
    )
    through: int | None = option(None, doc="Keep everything up to the end of this partition.")
    bytes: Size | None = option(None, doc='Keep this much of the disk\'s beginning, as in "20481 MiB".')
    blocks: Literal["used", "all"] = option(
        "used",
        doc="used leaves out blocks that no file uses, wherever the filesystem is known, clean and not being written; "
        "the image has zeros there. all copies every block.",
    )
    block_size: Literal["auto", "2 MiB", "4 MiB"] = option(
        "auto", doc="The window that is read at once; auto is 2 MiB where the image is compressed, else 4 MiB."
    )
    consistency: Literal["live", "offline", "freeze", "snapshot"] = option(
        "live",
        doc="Of filesystems that are mounted read-write: live copies them as they change, whole, and the manifest says "
        "so; offline refuses them; freeze holds them still until all is stored (fsfreeze, thawed by a watchdog); "
        "snapshot reads an LVM snapshot of the volume, made and removed by the run.",
        may_change=True,
    )
    rereads: int = option(
        3,
        doc="With live: once all is sent, read the disk again, so often at most, and send what changed, until nothing "
        "did. For encode.raw and fixed VHDs with checksum.guest, on targets where bytes can be replaced; 0: never.",
        may_change=True,
    )
    freeze_timeout: Duration = option(
        Duration(600), doc="A freeze ends after so long at the latest; then the run fails.", may_change=True
    )
    rate_limit: Size | None = option(
        None,
        doc='Read at most this much a second, as in "200 MiB", where others need the disk too.',
        may_change=True,
        minimum=RATE_MIN,
    )

    def __post_init__(self) -> None:
        given = [
            name
            for name, is_given in (
                ("partitions", self.partitions != "all"),
                ("through", self.through is not None),
                ("bytes", self.bytes is not None),
            )
            if is_given
        ]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} contradict each other: give one of them")
        if self.partitions == ():
            raise ValueError('partitions = [] keeps none; "all" keeps them all')
        if not 0 <= self.rereads <= _REREADS_MAX:
            raise ValueError(f"rereads must lie between 0 and {_REREADS_MAX}")


@dataclass(frozen=True, slots=True)
class Told:
    """A fact as the plain values that the manifest holds."""

    value: Any

    def to_json(self) -> Any:
        """The values."""
        return self.value


PARTITIONS: Fact[Told] = Fact("partitions", Told)
BLOCKS_TAKEN: Fact[Told] = Fact("blocks", Told)
CONSISTENCY: Fact[Told] = Fact("consistency", Told)


class DiskReader:
    """A disk as a map of runs and a threaded load."""

    def __init__(self, options: Options, context: StageContext) -> None:
        self._options = options
        self._path = options.path
        self._block_size = {"auto": None, "2 MiB": 2 * MiB, "4 MiB": 4 * MiB}[options.block_size]
        self._context = context
        self._limit = RateLimit(context.clock, options.rate_limit)
        self._size = 0  # of the disk; the selection has that of the virtual disk
        self._selection: Selection | None = None
        self._device = options.path  # what is read: the path, or a snapshot of it
        self._snapshot: Snapshot | None = None
        self._freeze: Freeze | None = None
        self._live: tuple[Use, ...] = ()  # who can write to what is taken
        self._written = 0  # bytes, when the copy began
        self._modified: int | None = None  # of a file, in ns, when it was opened
        self._hole = range(0)  # the last one that was found
        self._fd = -1
        self._map_fd = -1
        self._alignment = 0  # bytes; 0: not O_DIRECT
        self._is_device = False
        self._lock = threading.Lock()

    async def open(self) -> SourceInfo:
        """Open it read-only, probe what O_DIRECT wants, look at what it holds. Raises PlanError, SourceError."""
        if self._options.consistency == "snapshot" and not self._context.is_rehearsal:
            from stages.disk.snapshots import Snapshot

            self._snapshot = await Snapshot.take(self._path)
            self._device = self._snapshot.device
        try:
            info = await in_thread(self._context.threads, self._open)
        except OSError as error:
            raise PlanError(
                f"can't open the source: {os.strerror(error.errno or 0)}",
                operation="open",
                path=self._path,
                hint=_OPEN_HINTS.get(error.errno or 0, ""),
            ) from None
        return await self._select(info) if info.size else info

    async def _select(self, info: SourceInfo) -> SourceInfo:
        """Decide what is taken of the disk, and hold it still where that is wanted."""
        from stages.disk.occupancy import bytes_written, uses_of
        from stages.disk.selection import Wanted, select

        options = self._options
        uses = await in_thread(self._context.threads, lambda: uses_of(self._device))

        async def hold(table: PartitionTable, cut: Cut | None) -> Collection[str]:
            return await self._hold(uses, table, cut)

        chosen = await select(
            _Ranges(self, self._context.threads),
            Wanted(
                partitions=None if isinstance(options.partitions, str) else options.partitions,
                needed=options.partitions == "needed",
                through=options.through,
                stop=options.bytes,
                only_used=options.blocks == "used",
            ),
            sector_size=info.sector_size if self._is_device else None,
            uses=uses,
            hold=hold,
            rounding=self._context.rounding,
            path=self._path,
        )
        self._selection = chosen
        self._written = bytes_written(self._path) or 0
        self._context.facts.put(PARTITIONS, Told({"table": chosen.table.kind, "partitions": chosen.partitions()}))
        self._context.facts.put(
            BLOCKS_TAKEN,
            Told(
                {
                    "blocks": options.blocks,
                    "taken_bytes": chosen.used_bytes,
                    **chosen.identity,
                    "reasons": [list(one) for one in chosen.map.reasons()] if chosen.map else [],
                }
            ),
        )
        return replace(
            info,
            size=chosen.size,
            mapped_bytes=min(info.mapped_bytes, chosen.used_bytes),
            identity={**info.identity, **chosen.identity},
            summary=tuple(chosen.summary()),
            notes=tuple(self._notes()),
            is_changing=bool(self._restless),
            rereads=options.rereads if options.consistency == "live" and self._live else 0,
        )

    async def _hold(self, uses: Collection[Use], table: PartitionTable, cut: Cut | None) -> Collection[str]:
        """Refuse or freeze what is mounted read-write, as the options say; devices of what holds still then."""
        from stages.disk.selection import printable, used_partitions

        options = self._options
        self._live = tuple(
            use
            for use in uses
            if use.writable
            and use.kind != "swap"
            and (cut is None or used_partitions(table, use) & {0, *cut.kept} or not table.partitions)
        )
        if options.consistency == "offline" and self._live:
            points = ", ".join(dict.fromkeys(printable(use.point) for use in self._live))
            raise PlanError(
                f"the disk is in use: {points}",
                operation="open",
                path=self._path,
                hint='Unmount it, boot a rescue system, export a snapshot, or set consistency = "freeze" in read.disk.',
            )
        if options.consistency != "freeze" or not self._live or self._context.is_rehearsal:
            return ()
        from stages.disk.freezing import Freeze, refuse_own_files
        from stages.disk.occupancy import mounts_here

        targets: dict[str, str] = {}
        for use in self._live:
            if use.kind == "mount" and use.is_reachable:
                targets.setdefault(use.device, use.point)
        for use in self._live:
            if use.device not in targets:
                raise PlanError(
                    f"{printable(use.point)} can't be frozen: it is not mounted where this process could reach it",
                    operation="freeze",
                    hint="Run it where it is mounted (outside of the container), or stop what holds it.",
                )
        refuse_own_files(tuple(targets.items()), self._context.own_files)
        order = [mount.point for mount in mounts_here()]
        # What was mounted last comes first: a filesystem in a file on another one has to reach that to come to rest.
        latest_first = sorted(targets.values(), key=order.index, reverse=True)
        self._freeze = await Freeze.begin(latest_first, timeout_s=options.freeze_timeout)
        return [device for device, point in targets.items() if point in self._freeze.points]

    def _notes(self) -> Iterator[str]:
        from stages.disk.selection import printable

        points = list(dict.fromkeys(printable(use.point) for use in self._live))
        if self._snapshot is not None:
            yield f"read from the snapshot {printable(self._snapshot.name)}, removed at the end"
        elif self._options.consistency == "snapshot":
            yield "will be read from a snapshot"
        elif self._freeze is not None:
            yield f"frozen until every byte is stored: {', '.join(map(printable, self._freeze.points))}"
            if self._freeze.unable:
                unable = ", ".join(map(printable, self._freeze.unable))
                yield f"can't be frozen, and is copied whole as it changes: {unable}"
        elif points and self._options.consistency == "freeze":
            yield f"will be frozen: {', '.join(points)}"
        elif points:
            yield (
                f"mounted read-write at {', '.join(points)}: copied whole, as an image of many moments; "
                'consistency = "freeze" in read.disk holds it still'
            )

    def _open(self) -> SourceInfo:
        # Non-blocking: opening a pipe that nobody writes to would never return. It changes nothing for disks and files.
        self._map_fd = os.open(self._device, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        status = os.fstat(self._map_fd)
        self._is_device = stat.S_ISBLK(status.st_mode)
        sector = 512
        if self._is_device:
            self._size = struct.unpack("Q", fcntl.ioctl(self._map_fd, _BLKGETSIZE64, b"\0" * 8))[0]
            sector = struct.unpack("i", fcntl.ioctl(self._map_fd, _BLKSSZGET, b"\0" * 4))[0]
            mapped = self._size
        elif stat.S_ISREG(status.st_mode):
            self._size = status.st_size
            self._modified = status.st_mtime_ns
            mapped = min(self._size, status.st_blocks * 512)
        else:
            raise PlanError(
                "the source is neither a block device nor a file",
                operation="open",
                path=self._path,
                hint="Name the disk (/dev/sda, see lsblk) or a raw image file.",
            )
        self._probe_direct(sector)
        return SourceInfo(
            size=self._size,
            mapped_bytes=mapped,
            sector_size=sector,
            path=str(self._path),
            block_size=self._block_size,
            identity=_identity(self._path, status, self._is_device, self._size),
        )

    def _probe_direct(self, sector: int) -> None:
        """Open with O_DIRECT and find the alignment it takes; else stay with buffered reads."""
        reason = ""
        try:
            fd = os.open(self._device, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
        except OSError as error:
            reason = os.strerror(error.errno or 0)
        else:
            with mmap.mmap(-1, 64 * KiB) as probe:
                for alignment in (sector, 4 * KiB, 64 * KiB):
                    try:
                        os.preadv(fd, [memoryview(probe)[:alignment]], 0)
                    except OSError as error:
                        reason = os.strerror(error.errno or 0)
                        continue
                    self._fd, self._alignment = fd, alignment
                    return
            os.close(fd)
        self._fd, self._alignment = os.dup(self._map_fd), 0
        self._context.emit(
            FallbackTaken(stage=self._context.name, what="buffered reads instead of O_DIRECT", reason=reason)
        )

    async def windows(self, window: int, start: int = 0) -> AsyncIterator[Block]:
        """The disk from `start` as whole aligned windows and long skips; looks the map up ahead, in threads."""
        self._hole = range(0)  # a further look at a disk in use may find data there
        blocks = self._blocks(window, start)
        while True:
            batch = await in_thread(self._context.threads, lambda: _take(blocks, _RUNS_AT_ONCE))
            for block in batch:
                # Before the window is handed out: what sleeps in a thread can't be cancelled.
                await self._limit.wait(sum(run.length for run in block.runs if run.is_data))
                if self._freeze is not None and not self._freeze.is_held:
                    await self._thaw()
                yield block
            if len(batch) < _RUNS_AT_ONCE:
                return

    def _blocks(self, window: int, start: int) -> Iterator[Block]:
        """Tile the map's runs into windows; windows without data are joined to skips."""
        pending: list[Run] = []
        begin = start
        size = self._chosen.size
        for run in self._runs(start):
            while run.length:
                edge = begin - begin % window + window
                if not pending and not run.is_data and run.end - begin >= window:
                    stop = run.end if run.end == size else run.end - run.end % window
                    yield Block(begin, stop - begin, None, (Run(begin, stop - begin, run.content, run.why),))
                    run = Run(stop, run.end - stop, run.content, run.why)
                    begin = stop
                    continue
                length = min(run.length, edge - run.offset)
                pending.append(Run(run.offset, length, run.content, run.why))
                run = Run(run.offset + length, run.length - length, run.content, run.why)
                if pending[-1].end in (edge, size):
                    yield Block(begin, pending[-1].end - begin, None, tuple(pending))
                    begin, pending = pending[-1].end, []

    @property
    def _chosen(self) -> Selection:
        assert self._selection is not None, "open comes first"
        return self._selection

    def _runs(self, start: int) -> Iterator[Run]:
        """What is taken and what is not, from `start` to the end. Threads: any, one at a time for each iterator."""
        chosen = self._chosen
        runs = chosen.runs(start)
        return chosen.with_overlays(runs if self._is_device else self._without_holes(runs))

    def _without_holes(self, runs: Iterator[Run]) -> Iterator[Run]:
        """The runs, with the holes of the file where they lie in data."""
        for run in runs:
            position = run.offset
            while run.is_data and position < run.end:
                data, hole = self._next_extent(position)
                data, hole = min(data, run.end), min(hole, run.end)
                if data > position:
                    yield Run(position, data - position, Content.ZERO, Why.HOLE)
                if hole > data:
                    yield Run(data, hole - data, Content.DATA, Why.READ)
                position = hole
            if not run.is_data:
                yield run

    def _next_extent(self, position: int) -> tuple[int, int]:
        """The next data as (start, end), cut at the disk's size; (size, size) when only a hole is left."""
        with self._lock:  # SEEK_DATA and SEEK_HOLE move the one file offset
            if position in self._hole:  # a hole that many runs lie in is looked up once
                return self._hole.stop, self._hole.stop
            try:
                data = os.lseek(self._map_fd, position, os.SEEK_DATA)
                hole = os.lseek(self._map_fd, data, os.SEEK_HOLE)
            except OSError as error:
                if error.errno == errno.ENXIO:  # no data behind `position`: a hole, unless the file was cut short
                    self._check_size()
                    return self._size, self._size
                return position, self._size  # this filesystem can't tell: read everything
            self._hole = range(position, data)
        return min(data, self._size), min(hole, self._size)

    def _check_size(self) -> None:
        got = os.fstat(self._map_fd).st_size
        if got < self._size:
            raise self._shorter(got, self._size, got)

    def _shorter(self, offset: int, expected: int, got: int) -> SourceError:
        return SourceError(
            "the source is shorter than it said",
            operation="read",
            path=self._path,
            offset=offset,
            expected=expected,
            got=got,
            hint="The disk changed size during the export. Export a snapshot, or stop what writes to it.",
        )

    def load(self, block: Block, buffer: memoryview) -> None:
        """Fill the buffer with the block's bytes; zero runs are zeroed. Threads: any, several at once."""
        chosen = self._chosen
        unit = self._alignment or 1
        for begin, end, is_data in _stretches(block.runs):
            end = min(end, chosen.copied)  # behind it, data is what the overlays hold
            if is_data and begin < end:
                begin -= begin % unit
                self._read(begin, end - begin, buffer[begin - block.offset :])
        # Now, because a read is rounded out, and over small gaps on purpose: what is left out is zero by definition.
        for run in block.runs:
            if not run.is_data:
                _zero(buffer[run.offset - block.offset : run.end - block.offset])
        if block.end > chosen.copied:
            _zero(buffer[max(0, chosen.copied - block.offset) : block.length])
        chosen.patch(block.offset, buffer[: block.length])

    async def conclude(self) -> None:
        """See that what was taken for unused stayed so, thaw, and leave what was achieved as a fact.

        Raises:
            SourceError: a filesystem was written to while it was copied.
        """
        from stages.disk.occupancy import bytes_written

        chosen = self._chosen
        if chosen.map is not None and not await chosen.map.still_holds(_Ranges(self, self._context.threads)):
            raise SourceError(
                "the disk was written to while its used blocks were copied",
                operation="read",
                path=self._path,
                hint='Unmount it, or set consistency = "freeze" in read.disk; blocks = "all" copies a disk in use, as '
                "an image of many moments.",
            )
        written = bytes_written(self._path)
        restless = self._restless
        frozen = self._freeze.points if self._freeze is not None else ()
        await self._thaw()
        still = not restless and not frozen and self._snapshot is None
        modified = still and self._modified not in (None, os.fstat(self._map_fd).st_mtime_ns)
        if modified:
            if self._options.consistency == "offline":
                raise SourceError(
                    "the image file was written to while it was read",
                    operation="read",
                    path=self._path,
                    hint="Stop what writes to it (a virtual machine?) and run the export again.",
                )
            restless, still = (str(self._path),), False
        reread = self._context.facts.find(REREAD) if restless else None
        if still:
            achieved = "offline"
        elif restless:
            achieved = "settled" if reread is not None and reread.is_settled else "live"
        else:
            achieved = "frozen" if frozen else "snapshot"
        self._context.facts.put(
            CONSISTENCY,
            Told(
                {
                    "asked": self._options.consistency,
                    "achieved": achieved,
                    "frozen": list(frozen),
                    "changing": list(restless),
                    "written_bytes": None if written is None else max(0, written - self._written),
                    **({"modified": True} if modified else {}),
                    **(reread.to_json() if reread is not None else {}),
                }
            ),
        )

    @property
    def _restless(self) -> tuple[str, ...]:
        """Who may write to what is taken while it is read."""
        if self._freeze is not None:
            return self._freeze.unable
        return tuple(dict.fromkeys(use.point for use in self._live))

    async def _thaw(self) -> None:
        """Let the filesystems go. Raises SourceError where they were not held up to now."""
        from stages.disk.freezing import not_held

        freeze, self._freeze = self._freeze, None
        if freeze is None:
            return
        with anyio.CancelScope(shield=True):
            if not await freeze.end():
                raise not_held(self._options.freeze_timeout, self._path)

    def read_exactly(self, offset: int, length: int) -> bytes:
        """Bytes of the disk as it is. Threads: any. Raises SourceError."""
        unit = self._alignment or 1
        begin = offset - offset % unit
        with mmap.mmap(-1, max(1, round_up(offset + length, unit) - begin)) as aligned, memoryview(aligned) as view:
            self._read(begin, min(offset + length, self._size) - begin, view)
            return bytes(view[offset - begin : offset - begin + length])

    def _read(self, offset: int, length: int, into: memoryview) -> None:
        """Read exactly `length` bytes at `offset`, which is aligned; `into` has room for rounding the length up."""
        unit = self._alignment or 1
        done = 0
        while done < length:
            # A file's last bytes: the rounded-up read ends at the end of the file.
            wanted = min(round_up(length - done, unit), into.nbytes - done)
            try:
                got = os.preadv(self._fd, [into[done : done + wanted]], offset + done)
            except OSError as error:
                raise self._read_error(offset + done, length - done, into[done:], error) from None
            if got == 0:
                raise self._shorter(offset + done, length, done)
            done += got
            if done < length and done % unit:
                done -= done % unit  # a short direct read that is not at the end: read the odd sector again

    def _read_error(self, offset: int, length: int, scratch: memoryview, error: OSError) -> SourceError:
        """Say where exactly: go over the failed stretch in 4 KiB steps until one fails."""
        step = max(self._alignment, 4 * KiB)
        where = offset
        for candidate in range(offset, offset + length, step):
            try:
                os.preadv(self._fd, [scratch[: min(step, scratch.nbytes)]], candidate)
            except OSError:
                where = candidate
                break
        return SourceError(
            f"the source could not be read: {os.strerror(error.errno or 0)}",
            operation="read",
            path=self._path,
            offset=where,
            length=min(step, offset + length - where),
            hint="The medium may be failing. Rescue it into a file first (ddrescue), then export that file.",
        )

    async def close(self) -> None:
        """Thaw, close both descriptors, remove the snapshot; idempotent. Raises LeftBehindError."""
        if self._freeze is not None:
            with suppress(SourceError):  # said already, or of no importance any more
                await self._thaw()
        for fd in (self._fd, self._map_fd):
            if fd >= 0:
                os.close(fd)
        self._fd = self._map_fd = -1
        snapshot, self._snapshot = self._snapshot, None
        if snapshot is not None:
            await snapshot.remove()


class _Ranges:
    """The disk itself as a RangeReader, with O_DIRECT where it can: what a filesystem wrote, never what a cache has."""

    def __init__(self, disk: DiskReader, threads: anyio.CapacityLimiter) -> None:
        self._disk = disk
        self._threads = threads
        self.size = disk._size

    async def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes. Raises SourceError."""
        return await in_thread(self._threads, lambda: self._disk.read_exactly(offset, length))


def _take(blocks: Iterator[Block], count: int) -> list[Block]:
    taken = []
    for block in blocks:
        taken.append(block)
        if len(taken) == count:
            break
    return taken


def _stretches(runs: tuple[Run, ...]) -> Iterator[tuple[int, int, bool]]:
    """(begin, end, is_data) with small gaps between data joined to it."""
    begin, end = runs[0].offset, runs[0].offset
    is_data = runs[0].is_data
    for run in runs:
        gap = not run.is_data and run.length < _GAP_READ_ANYWAY and is_data
        if run.is_data != is_data and not gap:
            yield begin, end, is_data
            begin, is_data = end, run.is_data
        end = run.end
    yield begin, end, is_data


_ZEROS = bytes(64 * KiB)


def _zero(view: memoryview) -> None:
    for begin in range(0, view.nbytes, len(_ZEROS)):
        part = view[begin : begin + len(_ZEROS)]
        part[:] = _ZEROS[: part.nbytes]


def _identity(path: Path, status: os.stat_result, is_device: bool, size: int) -> dict[str, str]:
    """What tells this disk from another, for manifest and resume."""
    if not is_device:
        return {
            "path": str(path),
            "kind": "file",
            "size": str(size),
            "inode": f"{status.st_dev}:{status.st_ino}",
            "mtime_ns": str(status.st_mtime_ns),
        }
    number = f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
    found = {"path": str(path), "kind": "block device", "size": str(size), "device": number}
    for name in ("device/serial", "device/wwid", "wwid", "device/model", "loop/backing_file"):
        try:
            text = Path(f"/sys/dev/block/{number}/{name}").read_text(errors="replace").strip()
        except OSError:
            continue
        if text:
            found[name.rpartition("/")[2]] = text
    return found


_OPEN_HINTS = {
    errno.ENOENT: "Look the name up with lsblk.",
    errno.EACCES: "Reading a disk needs root: run it with sudo.",
    errno.EPERM: "Reading a disk needs root: run it with sudo.",
    errno.EBUSY: "Something holds the disk exclusively.",
    errno.ENOMEDIUM: "There is no medium in the drive.",
}


SPEC = StageSpec(
    name="read.disk",
    summary="Read a block device or raw image file with O_DIRECT, several reads at once; holes are not read.",
    options=Options,
    takes=NOTHING,
    gives=BLOCKS,
    build=DiskReader,
    provides=(DISK_SIZE, PARTITIONS, BLOCKS_TAKEN, CONSISTENCY),
)
