"""Going on in a new process: the journal of a run, the points to start again from, and whether the disk is the same.

A run notes what its store acknowledged, and about once a second a *point*: the encoder's state at a block boundary. The
next process starts at the last point below the lowest image byte that is not stored. What had been observed of the disk
up to there (leaf digests, the map) lies in a file of its own beside the journal, appended to at every point.

Where a compressor stands behind the encoder, a point is a pair: the compressor's state at the begin of a window, and
the encoder's last one at or before the byte with which that window begins. A check of the image lags behind both; a
point counts only where a later note of the check covers it.
"""

from __future__ import annotations

import json
import random
import secrets
import struct
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import anyio

from pipeline.errors import (
    FormatError,
    LeftBehindError,
    PipelineError,
    PlanError,
    SourceError,
    StageError,
    StoreError,
    VerificationError,
    first_error,
)
from pipeline.events import Event, FallbackTaken, RunResumed
from pipeline.flow.buffers import Pool
from pipeline.flow.items import Block
from pipeline.flow.journal import Record, RecordLog, parse
from pipeline.flow.mapping import MapRecorder
from pipeline.flow.parallel import in_thread, ordered_map
from pipeline.flow.stage import (
    Clock,
    Compressor,
    Encoder,
    FunctionStage,
    Inner,
    KeptPart,
    Remembering,
    RememberingCheck,
    Source,
    SourceInfo,
    Start,
    loader_of,
)
from pipeline.units import MiB

# A point costs the encoder's state (a few KiB to a few hundred) and a write. Twice as often halves what is made again
# after a kill; it is a second of work already. Where a point takes long (the states of many terabytes), they are fewer:
# their share of the time stays below a hundredth.
POINT_EVERY_S = 1.0
POINT_SHARE = 100
SYNC_EVERY_S = 1.0
# The journal is written anew when it is this much longer than what of it still counts, and twice as long.
SLACK = 4 * MiB
# Windows that are read again before a run goes on, unless all of them are: at most 256 MiB, a second or two.
SAMPLE_WINDOWS = 64

_HEADER, _UPLOAD, _PART, _MARK, _POINT, _END, _DROPPED, _CHECKED, _REWRITING = range(1, 10)
# position, guest offset, guest bytes, cover; inner position, guest bytes, window offset; lengths of both states
_POINT_HEAD = struct.Struct("<7QII")
_U64 = struct.Struct("<Q")
_U32 = struct.Struct("<I")
# What must be equal for two sources to be one disk. Whatever else differs (name, inode, time of change, a number that
# the kernel gives anew at each start) is no proof of either: then all that was sent is compared.
_SAME_DISK = ("kind", "size", "serial", "wwid", "seed")

Recheck = Literal["sample", "full"]


@dataclass(frozen=True, slots=True)
class Point:
    """An encoder's state before the block at `guest_offset`, when its next image byte was `position`.

    Attributes:
        position: of the image that is stored.
        guest_bytes: that all pieces before accounted for.
        cover: everything before `position` was made of guest bytes below this.
        outer: the compressor's state, where there is one; `inner` says where the encoder was then.
    """

    position: int
    guest_offset: int
    guest_bytes: int
    state: bytes
    cover: int
    inner: Inner | None = None
    outer: bytes = b""

    @property
    def start(self) -> Start:
        """Where a run that begins here begins."""
        return Start(
            position=self.position, guest_offset=self.guest_offset, guest_bytes=self.guest_bytes, inner=self.inner
        )

    def to_record(self) -> Record:
        """As it is noted."""
        inner = self.inner or Inner()
        head = _POINT_HEAD.pack(
            self.position,
            self.guest_offset,
            self.guest_bytes,
            self.cover,
            inner.position,
            inner.guest_bytes,
            inner.window_offset,
            len(self.state),
            len(self.outer),
        )
        return Record(_POINT, head + self.state + self.outer)

    @classmethod
    def of_record(cls, payload: bytes) -> Point:
        """What `to_record` noted."""
        position, offset, counted, cover, *inner, length, outer = _POINT_HEAD.unpack_from(payload)
        behind = _POINT_HEAD.size + length
        return cls(
            position,
            offset,
            counted,
            payload[_POINT_HEAD.size : behind],
            cover,
            Inner(position=inner[0], guest_bytes=inner[1], window_offset=inner[2]) if outer else None,
            payload[behind:],
        )


@dataclass(frozen=True, slots=True)
class _Inside:
    """The encoder's state at a block boundary, for the compressor behind it to make a point of."""

    start: Start
    state: bytes


class JournalError(PlanError):
    """The journal can't be made or written where it is wanted."""


class RunJournal:
    """The journal of one export, and the UploadJournal that its writer sees. On the event loop.

    Attributes:
        header: what the export is, as its first process described it; empty where there was no journal.
        published: where an earlier process published the image; empty where none did.
        rewritten_from: guest bytes from here on may have been replaced in the target after they were noted; None where
            none were.
        recheck: how much of what was sent is compared with the disk before going on.
        attempts: processes that worked on it, this one included.
        resume_command: for messages.
        expected: what the export is now; the header of a journal that begins anew.
    """

    def __init__(self, log: RecordLog, *, emit: Callable[[Event], None], clock: Clock, keep: bool) -> None:
        """Use `open` instead."""
        self._log = log
        self._leaves: RecordLog | None = None
        self._emit = emit
        self._clock = clock
        self._keep = keep
        self._broken = False
        self._is_closed = False
        self._next_point = float("-inf")
        self._observed: list[tuple[int, list[bytes]]] | None = None
        self._inside: deque[_Inside] = deque()
        self._noted_to = 0  # guest offset that the last note of observations reaches
        self._placing_to = 0  # guest offset of the last block boundary that was told
        self._uncovered: Point | None = None
        self._low = 0
        self.header: dict[str, Any] = {}
        self.id = ""
        self.upload: Mapping[str, Any] = {}
        self.parts: dict[int, KeptPart] = {}
        self.mark = 0
        self.rewritten_from: int | None = None
        self.points: list[Point] = []
        self.published = ""
        self.discards = False
        self.resends = False
        self.recheck: Recheck = "sample"
        self.start = Start()
        self.attempts = 1
        self.resume_command = ""
        self.discard_reason = ""
        self.expected: Mapping[str, Any] = {}
        self._read(log.found)
        log.found = []

    @classmethod
    def open(cls, path: Path, *, emit: Callable[[Event], None], clock: Clock, keep: bool) -> RunJournal:
        """Open or make the journal and lock it.

        Args:
            keep: what was sent stays after a failure.
        Raises:
            JournalError: it can't be written.
            PlanError: another process has it.
        """
        try:
            return cls(RecordLog.open(path), emit=emit, clock=clock, keep=keep)
        except OSError as error:
            raise JournalError(
                f"the journal can't be written: {error.strerror}",
                operation="plan",
                journal=path,
                hint='Set journal = PATH in [export], or journal = "off": then a killed run can\'t be resumed.',
            ) from None

    @property
    def path(self) -> Path:
        """The file."""
        return self._log.path

    @property
    def leaves_path(self) -> Path:
        """The file beside it with what was observed of the disk."""
        return self.path.with_suffix(".leaves") if self.path.suffix == ".journal" else Path(f"{self.path}.leaves")

    @property
    def is_unfinished(self) -> bool:
        """Whether an earlier process left something in the store."""
        return bool(self.header and self.upload and not self.published)

    @property
    def has_stored(self) -> bool:
        """Whether the store acknowledged any of the image."""
        return bool(self.parts) or self.mark > self._head_length

    @property
    def low_water(self) -> int:
        """Image bytes below this, behind the head, are in the target."""
        return max(self._low, self.mark)

    @property
    def _head_length(self) -> int:
        return int(self.header.get("layout", {}).get("head_length", 0))

    # -- reading ---------------------------------------------------------------------------------------------------

    def _read(self, records: Iterable[Record]) -> None:
        for record in records:
            if record.kind == _HEADER:
                self.header = json.loads(record.payload)
                self.id = str(self.header["id"])
                self._low = self._head_length
            elif not self.header:
                return  # damaged at its beginning: nothing in it can be trusted
            elif record.kind == _UPLOAD:
                self.upload = json.loads(record.payload)
            elif record.kind == _PART:
                part = KeptPart(**json.loads(record.payload))
                self.parts[part.number] = part
            elif record.kind == _DROPPED:
                for number in json.loads(record.payload):
                    self.parts.pop(number, None)
            elif record.kind == _MARK:
                self.mark = _U64.unpack(record.payload)[0]
            elif record.kind == _POINT:
                self.points.append(Point.of_record(record.payload))
            elif record.kind == _REWRITING:
                self.rewritten_from = _U64.unpack(record.payload)[0]
            elif record.kind == _END:
                self.published = json.loads(record.payload)["uri"]
        self._settle()

    def _settle(self) -> None:
        """Find the low water anew, from all parts."""
        self._low = self._head_length
        self._advance()

    def _advance(self) -> None:
        ends = {part.start: part.start + part.length for part in self.parts.values()}
        while self._low in ends:
            self._low = ends[self._low]

    # -- writing ---------------------------------------------------------------------------------------------------

    def begin(self, header: Mapping[str, Any]) -> None:
        """Start anew, with nothing in the store. Raises PlanError where the journal can't be written."""
        self.id = secrets.token_hex(8)
        self.header = {**header, "id": self.id}
        self.start = Start(position=self._head_length)
        self.upload, self.parts, self.mark, self.points, self.published = {}, {}, 0, [], ""
        self.rewritten_from = None
        self.attempts = 1
        self._noted_to = self._placing_to = 0
        self._uncovered = None
        self._inside.clear()
        self._settle()
        try:
            self._remove_leaves()
            self._log.rewrite(self._live())
        except OSError as error:
            raise PlanError(
                f"the journal can't be written: {error.strerror}", operation="plan", journal=self.path
            ) from None

    def begin_anew(self, reason: str) -> None:
        """Nothing of what earlier processes noted is in the store any more. Tells the user why."""
        self._emit(FallbackTaken(stage="engine", what="the export starts anew", reason=self.discard_reason or reason))
        self.discards = False
        self.begin(self.expected)

    def note_upload(self, state: Mapping[str, Any]) -> None:
        """Remember how the upload is found again. Durable when it returns."""
        self.upload = dict(state)
        self._append(Record(_UPLOAD, _json(self.upload)), durable=True)

    def note_part(self, part: KeptPart) -> None:
        """The store acknowledged a part."""
        self.parts[part.number] = part
        self._append(Record(_PART, _json(asdict(part))))
        if part.start == self._low:
            self._advance()

    def note_mark(self, position: int) -> None:
        """Every image byte below is on stable storage in the target."""
        self.mark = position
        self._append(Record(_MARK, _U64.pack(position)))

    def note_rewriting(self, guest_offset: int) -> None:
        """Bytes of the disk from here on are replaced in the target by later ones. Durable when it returns.

        Raises:
            StoreError: a later process would not know of it.
        """
        if self.rewritten_from is None or guest_offset < self.rewritten_from:
            self.rewritten_from = guest_offset
            self._append(Record(_REWRITING, _U64.pack(guest_offset)), durable=True)
        if self._broken:
            try:
                self._remove_leaves()  # without them nobody starts from a point: all is made again
            except OSError as error:
                raise StoreError(
                    f"the journal can neither be written nor removed: {error.strerror}",
                    operation="read again",
                    journal=self.path,
                    hint='Set journal = PATH on another disk, or journal = "off" in [export].',
                ) from None

    def drop_parts(self, numbers: Iterable[int]) -> None:
        """The store does not have these parts after all."""
        gone = [number for number in numbers if self.parts.pop(number, None)]
        if gone:
            self._append(Record(_DROPPED, _json(gone)), durable=True)
            self._settle()

    def note_published(self, uri: str) -> None:
        """The image is the result; what is left is to remove the journal."""
        self.published = uri
        self._append(Record(_END, _json({"uri": uri})), durable=True)

    def take_point(
        self,
        encoder: Encoder[Any],
        start: Start,
        remembering: Sequence[Remembering],
        *,
        checks: Sequence[RememberingCheck] = (),
        is_end: bool = False,
        is_inner: bool = False,
    ) -> None:
        """Called before every block is observed and placed, and at the end; takes a point about once a second.

        Args:
            start: of a run that begins at this block.
            remembering: whose observations are noted, always in the same order.
            checks: of the image, likewise.
            is_end: the disk was read to its end: always a point.
            is_inner: a compressor is behind the encoder: `take_outer_point` makes the point.
        """
        here = start.guest_offset
        self._placing_to = here
        if self._uncovered is not None:
            self._add_point(replace(self._uncovered, cover=here))
            self._uncovered = None
        begun = self._clock.now()
        if self._broken or (not is_end and begun < self._next_point) or here <= self._noted_to:
            return
        deltas = [one.delta() for one in remembering]
        state = encoder.checkpoint()
        self._append_leaves(_POINT, here, deltas)
        self._noted_to = here
        self._note_checks(checks)
        if is_inner:
            self._inside.append(_Inside(start, state))
        else:
            self._add_point(Point(start.position, here, start.guest_bytes, state, here))
        now = self._clock.now()
        self._next_point = now + max(POINT_EVERY_S, POINT_SHARE * (now - begun))

    def take_outer_point(
        self,
        compressor: Compressor[Any],
        window_offset: int,
        guest_bytes: int,
        checks: Sequence[RememberingCheck] = (),
    ) -> None:
        """Called before every window of a compressor is placed; makes a point of the encoder's last state before it.

        Args:
            window_offset: where the window begins in the image before compressing.
            guest_bytes: how much of the disk the windows before account for.
            checks: of the image. They are noted here too: many windows come after the last block boundary.
        """
        found: _Inside | None = None
        while self._inside and self._inside[0].start.position <= window_offset:
            found = self._inside.popleft()
        if found is None or self._broken:
            return
        begun = self._clock.now()
        self._note_checks(checks)
        inner = Inner(position=found.start.position, guest_bytes=found.start.guest_bytes, window_offset=window_offset)
        # Blocks that were placed since are in what is stored, too, and the last one may be on its way: until the next
        # boundary is told nobody knows where it ends.
        self._uncovered = Point(
            compressor.position,
            found.start.guest_offset,
            guest_bytes,
            found.state,
            self._placing_to,
            inner,
            compressor.checkpoint(),
        )
        if self._placing_to >= self._disk_size > 0:
            self._add_point(self._uncovered)
            self._uncovered = None
        now = self._clock.now()
        self._next_point = max(self._next_point, now + POINT_SHARE * (now - begun))

    def _note_checks(self, checks: Sequence[RememberingCheck]) -> None:
        for check in checks:
            if noted := check.delta():
                self._append_leaves(_CHECKED, check.covered, [noted])

    def _add_point(self, point: Point) -> None:
        self.points.append(point)
        self._append(point.to_record())

    @property
    def _disk_size(self) -> int:
        return int(self.header.get("source", {}).get("size", 0))

    def _append_leaves(self, kind: int, behind: int, deltas: Sequence[bytes]) -> None:
        body = [_U64.pack(behind)]
        for delta in deltas:
            body += [_U32.pack(len(delta)), delta]
        try:
            self._opened_leaves().append(Record(kind, b"".join(body)))
        except OSError as error:
            self._give_up(error)

    def _opened_leaves(self) -> RecordLog:
        if self._leaves is None:
            self._leaves = RecordLog.open(self.leaves_path)
            found = self._leaves.found
            if not found or found[0].kind != _HEADER or found[0].payload.decode("ascii", "replace") != self.id:
                self._leaves.rewrite([Record(_HEADER, self.id.encode())])
                self._leaves.found = []
        return self._leaves

    def _append(self, record: Record, *, durable: bool = False) -> None:
        if self._broken:
            return
        try:
            self._log.append(record, durable=durable)
            if self._log.size > SLACK:
                self._compact()
        except OSError as error:
            self._give_up(error)

    def _compact(self) -> None:
        self._drop_points()
        live = self._live()
        if self._log.size > SLACK + 2 * sum(len(record.payload) for record in live):
            self._log.rewrite(live)

    def _drop_points(self) -> None:
        """Forget those that nobody starts from any more."""
        limit = self.low_water
        for _ in range(2):  # the last one that can be started from, and one that does not cut the same part
            below = [index for index, point in enumerate(self.points) if point.position <= limit]
            if not below:
                return
            keep = below[-1]
            limit = self.part_start(self.points[keep].position)
        del self.points[:keep]

    def _live(self) -> list[Record]:
        records = [Record(_HEADER, _json(self.header))]
        if self.upload:
            records.append(Record(_UPLOAD, _json(self.upload)))
        records += [Record(_PART, _json(asdict(part))) for part in self.parts.values()]
        if self.mark:
            records.append(Record(_MARK, _U64.pack(self.mark)))
        if self.rewritten_from is not None:
            records.append(Record(_REWRITING, _U64.pack(self.rewritten_from)))
        return records + [point.to_record() for point in self.points]

    def _give_up(self, error: OSError) -> None:
        self._broken = True
        self._emit(
            FallbackTaken(
                stage="engine",
                what=f"the journal {self.path} is not written any more; a kill loses what is sent from here on",
                reason=error.strerror or str(error),
            )
        )

    async def keep_durable(self, threads: anyio.CapacityLimiter) -> None:
        """Bring what was noted to stable storage once a second; runs until it is cancelled."""
        while not self._broken:
            await anyio.sleep(SYNC_EVERY_S)
            try:
                await in_thread(threads, self._sync)
            except OSError as error:
                self._give_up(error)

    def _sync(self) -> None:
        if self._leaves is not None:
            self._leaves.sync()  # first: a point without its leaves is of no use
        self._log.sync()

    # -- going on --------------------------------------------------------------------------------------------------

    def usable_points(self, below: int) -> list[Point]:
        """The points at or below an image offset whose observations are all there, the latest first."""
        if not self.points:
            return []
        known = {offset for offset, _ in self._observations()}
        return sorted(
            (point for point in self.points if point.position <= below and point.guest_offset in known),
            key=lambda point: point.guest_offset,
            reverse=True,
        )

    def part_start(self, position: int) -> int:
        """Where the stored part begins that this image offset lies inside of; else the offset itself."""
        inside = (part.start for part in self.parts.values() if part.start < position < part.start + part.length)
        return next(inside, position)

    def compared_until(self, point: Point, size: int, checked: int = 0) -> int | None:
        """How far the disk has to be compared, in guest bytes, to start at a point.

        A part that the point cuts can't be compared as a whole; so what it holds of the disk behind the point has to
        be. None where that was not noted.

        Args:
            checked: image bytes below this are in the digests of a check already, and are made again.
        """
        ends = [part.start + part.length for part in self.parts.values() if part.start < point.position]
        cut = max([checked, *(end for end in ends if point.position < end)])
        needed = point.cover
        if cut > point.position:
            reaching = (one.cover for one in self.points if one.position >= cut or one.guest_offset == size)
            needed = min(reaching, default=size + 1)
        return min((offset for offset, _ in self._observations() if offset >= needed), default=None)

    def checked_from(self, position: int) -> int | None:
        """How far the first note of a check reaches that covers an image offset; None where there is none."""
        if position <= self._head_length:
            return position
        return next((behind for behind, _ in self._checked() if behind >= position), None)

    def recall_checks(self, checks: Sequence[RememberingCheck], position: int) -> None:
        """Add what a check of an earlier process did, up to the first note that covers an image offset."""
        for check in checks:
            for behind, delta in self._checked():
                if position <= self._head_length:
                    break
                check.recall(delta)
                if behind >= position:
                    break

    def _checked(self) -> list[tuple[int, bytes]]:
        records = [one for one in self._opened_leaves().found[1:] if one.kind == _CHECKED]
        return [(_guest_end(one), one.payload[_U64.size + _U32.size :]) for one in records]

    def recall(self, guest_offset: int, remembering: Sequence[Remembering]) -> None:
        """Observe again what earlier processes did below a point's guest offset."""
        for offset, deltas in self._observations():
            if offset > guest_offset:
                return
            for one, delta in zip(remembering, deltas, strict=True):
                one.recall(delta)

    def go_on_from(self, point: Point | None) -> None:
        """This process starts here: forget later points, whose observations are made again."""
        self.start = point.start if point else Start(position=self._head_length)
        self.points = [one for one in self.points if one.guest_offset <= self.start.guest_offset] if point else []
        # All that lies behind is sent again, whatever was known of it.
        self.mark, self.rewritten_from = min(self.mark, self.start.position), None
        self.attempts = int(self.header.get("attempts", 1)) + 1
        self.header = {**self.header, "attempts": self.attempts}
        try:
            leaves = self._opened_leaves()
            checked = self.checked_from(self.start.position) or 0
            reached = {_POINT: self.start.guest_offset, _CHECKED: checked if point else 0}
            kept = [record for record in leaves.found[1:] if _guest_end(record) <= reached.get(record.kind, 0)]
            self._noted_to = self.start.guest_offset
            leaves.rewrite([Record(_HEADER, self.id.encode()), *kept])
            leaves.found, self._observed = [], []
            self._log.rewrite(self._live())
        except OSError as error:
            self._give_up(error)

    def _observations(self) -> list[tuple[int, list[bytes]]]:
        """(guest offset behind, deltas) in order; ends at the first that is not as it should be."""
        if self._observed is not None:
            return self._observed
        found: list[tuple[int, list[bytes]]] = []
        for record in self._opened_leaves().found[1:]:
            if record.kind != _POINT:
                continue
            offset = _guest_end(record)
            if found and offset <= found[-1][0]:
                break
            deltas = []
            position = _U64.size
            while position < len(record.payload):
                (length,) = _U32.unpack_from(record.payload, position)
                position += _U32.size
                deltas.append(record.payload[position : position + length])
                position += length
            found.append((offset, deltas))
        self._observed = found
        return found

    # -- the end ---------------------------------------------------------------------------------------------------

    def keeps(self, error: BaseException) -> bool:
        """Whether what is in the store stays there after this failure.

        Never after a failed verification, nor after a defect of this program: neither would end better next time.
        """
        if not self._keep or not self.has_stored:
            return False
        told = first_error(error)
        if isinstance(told, (VerificationError, StageError, FormatError, LeftBehindError)):
            return False
        return isinstance(told, (PipelineError, OSError)) or not isinstance(told, Exception)

    def remove_commands(self) -> tuple[str, ...]:
        """Shell commands that remove what is in the store, and the journal."""
        told = tuple(str(one) for one in self.upload.get("commands", ()))
        return (*told, f"rm {self.path} {self.leaves_path}")

    def remove(self) -> None:
        """Nothing is left to go on with."""
        self._is_closed = True
        self._remove_leaves()
        self._log.remove()

    def _remove_leaves(self) -> None:
        if self._leaves is None:
            self._leaves = RecordLog.open(self.leaves_path)
        self._leaves.remove()
        self._leaves = self._observed = None

    def close(self) -> None:
        """Let the files go; an empty journal goes too. Idempotent."""
        if self._is_closed:
            return
        self._is_closed = True
        if not self.upload and not self.published and self.path.exists():
            self.remove()
            return
        if self._leaves is not None:
            self._leaves.close()
        self._log.close()


def is_unfinished(path: Path) -> bool:
    """Whether the journal at `path` is of a run that left something in the store. Only looks, and locks nothing."""
    try:
        records, _ = parse(path.read_bytes())
    except OSError:
        return False
    if not records or records[0].kind != _HEADER or any(record.kind == _END for record in records):
        return False
    return any(record.kind == _UPLOAD and json.loads(record.payload) for record in records)


def _json(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":"), sort_keys=True).encode()


def _guest_end(record: Record) -> int:
    offset: int = _U64.unpack_from(record.payload)[0]
    return offset


# -- the same disk? ------------------------------------------------------------------------------------------------


def other_disk(before: Mapping[str, str], now: Mapping[str, str]) -> tuple[str, str, str] | None:
    """(what, before, now) where two identities can't be of one disk."""
    for name in _SAME_DISK:
        if before.get(name) != now.get(name):
            return name, before.get(name, "none"), now.get(name, "none")
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Restart:
    """How an export begins.

    Attributes:
        functions, recorder: with everything that earlier processes observed below `start`.
        encoder: with the state of `start`.
    """

    start: Start
    functions: list[FunctionStage[Any]]
    recorder: MapRecorder
    encoder: Encoder[Any]


async def restart(
    journal: RunJournal,
    *,
    below: int,
    info: SourceInfo,
    source: Source,
    make_functions: Callable[[], list[FunctionStage[Any]]],
    make_encoder: Callable[[], Encoder[Any]],
    compressor: Compressor[Any] | None,
    checks: Sequence[object],
    window: int,
    workers: int,
    threads: anyio.CapacityLimiter,
    emit: Callable[[Event], None],
) -> Restart:
    """Find the last point from which all that is missing can be made, and see that the disk is still the same there.

    Args:
        below: image bytes below this are stored.
        compressor, checks: fresh; are given the state of the point.
    Raises:
        PlanError: the disk changed, and what was sent of it can't be sent again.
        SourceError: the disk can't be read.
    """
    full = journal.recheck == "full" or dict(journal.header["source"]) != info.identity
    points = journal.usable_points(below)
    if (replaced := journal.rewritten_from) is not None:
        # What was noted of the bytes behind is not what the target holds any more.
        points = [one for one in points if one.guest_offset <= replaced]
    functions, recorder = make_functions(), MapRecorder()
    can_compare = any(isinstance(one, Remembering) for one in functions)
    compared = 0
    if points and not can_compare and full:
        # Without digests the image itself is the proof: all of it is made again, and compared part by part.
        points = []
    checking = remembering_checks(checks)
    if checking:
        points = [one for one in points if journal.checked_from(one.position) is not None]

    def until(point: Point) -> int | None:
        return journal.compared_until(point, info.size, (journal.checked_from(point.position) or 0) if checking else 0)

    if can_compare:
        while points and until(points[0]) is None:
            del points[0]
    if points:
        point = points[0]
        if can_compare:
            end = until(point) or point.guest_offset
            journal.recall(end, remembering(functions, recorder))
            check = _Check(source, functions, window, workers, threads)
            changed = None
            if not full:
                seed = f"{journal.id} {journal.attempts}"
                compared, changed = await check.sample(point.guest_offset, end, seed=seed)
            if full or changed is not None:  # the lowest change, which a sample does not know
                compared, found = await check.all(end)
                changed = found or changed
            if changed is not None:
                if not journal.resends:
                    raise _changed(changed)
                emit(FallbackTaken(stage="engine", what="what changed is sent again", reason=str(changed)))
                limit = journal.part_start(_offset_of(changed) + 1)  # the same in disk and image
                points = [one for one in points if one.position <= min(limit, _offset_of(changed))]
                while points and until(points[0]) is None:
                    del points[0]
        else:
            emit(
                FallbackTaken(
                    stage="engine",
                    what="what was sent is not compared with the disk",
                    reason="the chain has no checksum.guest",
                )
            )
    encoder = make_encoder()
    chosen = points[0] if points else None
    functions, recorder = make_functions(), MapRecorder()
    if chosen is not None:
        journal.recall(chosen.guest_offset, remembering(functions, recorder))
        encoder.restore(chosen.state)
        journal.recall_checks(checking, chosen.position)
        if compressor is not None:
            compressor.restore(chosen.outer)
    journal.header = {**journal.header, "source": dict(info.identity)}
    journal.go_on_from(chosen)
    for one in remembering(functions, recorder):
        one.delta()  # what was recalled is noted already
    emit(
        RunResumed(
            guest_bytes=journal.start.guest_offset,
            image_bytes=journal.low_water,
            parts=len(journal.parts),
            compared_bytes=compared,
        )
    )
    return Restart(start=journal.start, functions=functions, recorder=recorder, encoder=encoder)


def remembering(functions: Sequence[FunctionStage[Any]], recorder: MapRecorder) -> list[Remembering]:
    """Whose observations a journal notes, in the order in which it does."""
    return [recorder, *(one for one in functions if isinstance(one, Remembering))]


def remembering_checks(checks: Sequence[object]) -> list[RememberingCheck]:
    """Those checks of the image whose digests a journal notes."""
    return [one for one in checks if isinstance(one, RememberingCheck)]


class _Check:
    """Reads what was sent once more and lets the function stages compare it with what they observed then."""

    def __init__(
        self,
        source: Source,
        functions: Sequence[FunctionStage[Any]],
        window: int,
        workers: int,
        threads: anyio.CapacityLimiter,
    ) -> None:
        self._source = source
        self._functions = functions
        self._window = window
        self._workers = workers
        self._threads = threads

    async def sample(self, end: int, dense_end: int, *, seed: str) -> tuple[int, SourceError | None]:
        """Compare some windows below guest offset `end`, with the first and the last, and all from there up to
        `dense_end`.
        """
        count = -(-end // self._window)
        some = random.Random(seed).sample(range(count), min(count, SAMPLE_WINDOWS - 2)) if count else []
        chosen = {*some, *((0, count - 1) if count else ()), *range(count, -(-dense_end // self._window))}

        async def blocks() -> Any:
            for number in sorted(chosen):
                async for block in self._source.windows(self._window, number * self._window):
                    yield block
                    break

        return await self._compare(blocks())

    async def all(self, end: int) -> tuple[int, SourceError | None]:
        """Compare everything below guest offset `end`, up to the first difference."""

        async def blocks() -> Any:
            async for block in self._source.windows(self._window):
                if block.offset >= end:
                    return
                yield block

        return await self._compare(blocks())

    async def _compare(self, blocks: Any) -> tuple[int, SourceError | None]:
        """(guest bytes read, the first difference)."""
        pool = Pool(self._window, self._workers)
        read = 0

        async def work(block: Block) -> tuple[Block, list[Any]]:
            if not any(run.is_data for run in block.runs):
                return block, self._notes(block)
            lease = await pool.lease()
            load = await loader_of(self._source)(block)

            def process() -> list[Any]:
                load(lease.buffer)
                return self._notes(Block(block.offset, block.length, lease.into_slice(block.length), block.runs))

            return block, await in_thread(self._threads, process)

        async def place(done: tuple[Block, list[Any]]) -> None:
            nonlocal read
            block, notes = done
            if any(run.is_data for run in block.runs):
                read += block.length
            for function, note in zip(self._functions, notes, strict=True):
                try:
                    function.confirm(note, block.offset)
                except SourceError as error:
                    raise _Differs(error) from None

        try:
            await ordered_map(blocks, work, place, workers=self._workers)
        except BaseExceptionGroup as group:
            told = [one for one in _leaves(group) if isinstance(one, _Differs)]
            if not told:
                raise first_error(group) from group
            return read, told[0].error
        except _Differs as found:
            return read, found.error
        finally:
            pool.close()
        return read, None

    def _notes(self, block: Block) -> list[Any]:
        """What every function stage notes of a block, which is released. Threads: any."""
        notes = []
        for function in self._functions:
            block, note = function.apply(block)
            notes.append(note)
        block.release()
        return notes


class _Differs(Exception):
    def __init__(self, error: SourceError) -> None:
        super().__init__(str(error))
        self.error = error


def _leaves(group: BaseExceptionGroup[BaseException]) -> Iterable[BaseException]:
    for one in group.exceptions:
        if isinstance(one, BaseExceptionGroup):
            yield from _leaves(one)
        else:
            yield one


def _offset_of(error: SourceError) -> int:
    offset = error.context.get("offset")
    return offset if isinstance(offset, int) else 0


def _changed(found: SourceError) -> PlanError:
    return PlanError(
        "the disk changed since it was sent",
        operation="resume",
        hint="An image of two moments would not boot or lose files. Export a snapshot, and start anew: --discard.",
        offset=found.context.get("offset"),
        length=found.context.get("length"),
    )
