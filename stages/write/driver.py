"""Store pieces as one object made of numbered parts: the one driver for every store that has them.

Pieces arrive in sequence, or in sequence behind a head that comes last. They are gathered into the parts of a plan
made before the start; several parts are on their way at once, each kept in memory until the store acknowledged it. A
part too long for that is streamed: sent while its pieces arrive, and made again by replay where it has to be sent
again. An image that ends before the first part is full goes up in one request.

Nothing is sealed unless every guest byte is accounted for, and whatever fails or is cancelled is removed again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import anyio
import anyio.abc

from pipeline.errors import LeftBehindError, PlanError, SourceError, StageError, StoreError, first_error
from pipeline.events import PartReplayed, PartStored, UploadOpened, UploadRemoved
from pipeline.flow.buffers import Slice, charged_slice
from pipeline.flow.channels import Inlet
from pipeline.flow.items import Piece
from pipeline.flow.orders import Order, PartLimits
from pipeline.flow.parallel import in_thread
from pipeline.flow.stage import SinkPlan, SinkRequest, StageContext
from pipeline.units import MiB, format_size
from stages.store.digests import Algorithm
from stages.write.bodies import ImageEnded, KeptBody, Segment, StreamedBody, sum_segments
from stages.write.kept import PartJournal, stored_part, sums_to_text
from stages.write.parts import PartPlan, PlannedPart, plan_parts
from stages.write.shapes import Body, PartUpload, Sealed, StoredPart

# Cleaning up after a failure may take this long. Less leaves more behind on slow stores; more keeps whoever pressed
# Ctrl-C waiting, and a dead store has 20 s after its last retry before the run has to be over.
ABORT_DEADLINE_S = 15.0
# Windows of the chain in flight between a part's first and last byte: their buffers are held whole.
_STRADDLING_WINDOWS = 2
_USUAL_WINDOW = 4 * MiB


@dataclass(frozen=True, slots=True, kw_only=True)
class DriverPlan:
    """How one image is stored. Bytes and counts.

    Attributes:
        head_length: image bytes that come last; 0 where all come in sequence.
        kept_max: parts up to this length wait in memory, longer ones are streamed.
        in_flight: parts on their way at once.
        memory: what kept parts may hold together.
    """

    parts: PartPlan
    head_length: int
    kept_max: int
    in_flight: int
    memory: int

    def is_streamed(self, part: PlannedPart) -> bool:
        """Whether the part is too long to wait in memory."""
        return part.length > self.kept_max

    @property
    def sink(self) -> SinkPlan:
        """What the planning needs to know of it."""
        streamed = tuple(part.start for part in self.parts.body if self.is_streamed(part))
        kept = max((part.length for part in self.parts.parts if not self.is_streamed(part)), default=0)
        flights = f"{self.in_flight} in flight" + (
            f", {len(streamed)} of them streamed one at a time" if streamed else ""
        )
        return SinkPlan(
            boundaries=streamed,
            held_bytes=min(self.memory, max(kept, _USUAL_WINDOW) + _STRADDLING_WINDOWS * _USUAL_WINDOW),
            summary=(
                ("parts", self.parts.describe()),
                ("sending", "one request" if self.parts.single else flights),
                ("memory for parts", f"at most {format_size(self.memory)}"),
            ),
        )


def plan_driver(limits: PartLimits, request: SinkRequest, *, parts_in_flight: int) -> DriverPlan:
    """Decide on parts, on which of them are streamed, and on how many travel at once.

    Raises:
        PlanError: the store's limits, or the memory, do not allow any way.
    """
    head = request.layout.head_length if request.order is Order.HEAD_LAST else 0
    parts = plan_parts(limits, image_bytes_max=request.layout.image_bytes_max, head_length=head)
    memory = request.memory
    # A third: one part is gathered while at least one other is on its way, and windows straddle both ends of a part.
    kept_max = memory if parts.single else memory // 3
    held = parts.longest if parts.single else head
    if held > memory:
        raise PlanError(
            f"{format_size(held)} of the image have to be kept until its end, "
            f"and {format_size(memory)} of memory are left for them",
            operation="plan",
            hint='Raise "memory" in [export].',
        )
    first = min(parts.body[0].length if parts.body else head, max(kept_max, 1))
    return DriverPlan(
        parts=parts,
        head_length=head,
        kept_max=kept_max,
        in_flight=max(1, min(parts_in_flight, memory // first - 1)),
        memory=memory,
    )


@dataclass(slots=True)
class _Gathering:
    """A part while its pieces arrive. Owns its segments.

    Attributes:
        cut: bytes of it that lie before the first piece of this process; then it is stored already, and can't be
            compared.
    """

    part: PlannedPart
    cut: int = 0
    segments: list[Segment] = field(default_factory=list)
    length: int = 0
    guest_bytes: int = 0
    streamed: StreamedBody | None = None

    @property
    def held_bytes(self) -> int:
        return sum(segment.held_bytes for segment in self.segments)

    def add(self, segment: Segment) -> None:
        self.segments.append(segment)
        self.length += segment.length

    def release(self) -> None:
        for segment in self.segments:
            segment.release()
        self.segments.clear()
        if self.streamed is not None:
            self.streamed.discard()


class PartDriver:
    """Drives one upload from the first piece to the sealed object, or to its abort. Used once."""

    def __init__(
        self, upload: PartUpload, context: StageContext, plan: DriverPlan, journal: PartJournal | None = None
    ) -> None:
        """Prepare it; nothing is sent before `store`.

        Args:
            journal: notes what the store acknowledged; parts that it knows of an earlier process are not sent again.
        """
        self._upload = upload
        self._context = context
        self._plan = plan
        self._body = plan.parts.body
        self._next_part = 0
        self._position = plan.head_length
        self._position_before = 0  # where the piece under way begins
        self._head_position = 0
        self._head = _Gathering(PlannedPart(1, 0, plan.head_length))
        self._gathering: _Gathering | None = None
        self._loose_guest_bytes = 0
        self._guest_bytes = 0
        self._stored: dict[int, StoredPart] = {}
        self._opened = False
        self._flying = 0
        self._flying_bytes = 0
        self._streaming = False
        self._landed = anyio.Event()
        self._journal = journal
        self._earlier: dict[int, StoredPart] = {}
        if journal is not None:
            self._go_on(journal)

    def _go_on(self, journal: PartJournal) -> None:
        """Take over what an earlier process stored."""
        self._opened = journal.is_open
        self._position = max(journal.start, self._plan.head_length)
        self._guest_bytes = journal.guest_bytes
        for kept in journal.parts.values():
            is_head = bool(self._plan.head_length) and kept.number == 1
            if kept.start + kept.length <= self._position and not is_head:
                self._stored[kept.number] = stored_part(kept)
            else:  # made again, compared, and not sent
                self._earlier[kept.number] = stored_part(kept)
        while self._next_part < len(self._body) and self._body[self._next_part].end <= self._position:
            self._next_part += 1

    async def store(self, inlet: Inlet[Piece]) -> Sealed:
        """Take every piece, store and seal.

        Raises:
            StageError: pieces or guest bytes are missing or in the wrong order; nothing was committed.
            StoreError: the store failed for good.
            LeftBehindError: it failed, and removing what was stored failed too.
        Cancellation: what was stored is removed within ABORT_DEADLINE_S.
        """
        self._context.meter.parallelism = self._plan.in_flight
        try:
            try:
                async with anyio.create_task_group() as tasks:
                    async for piece in inlet:
                        await self._take(piece, tasks)
                    whole = await self._send_rest(tasks)
            except BaseExceptionGroup as group:
                raise first_error(group) from group
            sealed = whole if whole is not None else await self._seal()
            if sealed.size != self._position:
                raise StoreError(
                    "the sealed object has another size than the image",
                    operation="seal",
                    expected=self._position,
                    got=sealed.size,
                )
        except BaseException as error:
            self._head.release()
            if self._gathering is not None:
                self._gathering.release()
            if self._opened and not (self._journal is not None and self._journal.keeps(error)):
                await abort_upload(self._upload, self._context, error)
            raise
        return sealed

    # ---- gathering -------------------------------------------------------------------------------------------------

    async def _take(self, piece: Piece, tasks: anyio.abc.TaskGroup) -> None:
        if piece.length == 0:
            piece.release()
            self._loose_guest_bytes += piece.guest_bytes
            return
        is_head = piece.offset < self._plan.head_length
        expected = self._head_position if is_head else self._position
        if piece.offset != expected or (self._head_position and not is_head):
            piece.release()
            raise StageError(
                "a piece came out of order",
                operation="write",
                offset=piece.offset,
                length=piece.length,
                expected=expected,
                order=self._context.order.value,
            )
        rest = Segment.of(piece)
        if is_head:
            self._head_position = piece.end
            self._head.add(await self._without_buffer(rest))
            self._head.guest_bytes += piece.guest_bytes
            return
        self._position_before = self._position
        self._position = piece.end
        while True:
            gathering = self._gathering
            if gathering is None:
                try:
                    gathering = await self._begin(tasks)
                except BaseException:
                    rest.release()
                    raise
            room = gathering.part.length - gathering.length
            if not room:  # only a part that goes up alone stays here when it is full
                rest.release()
                raise self._too_long()
            now, later = (rest, None) if rest.length <= room else rest.split(room)
            if later is None:  # the guest bytes of a piece count where it ends
                gathering.guest_bytes += piece.guest_bytes + self._loose_guest_bytes
                self._loose_guest_bytes = 0
            try:
                await self._put_in(gathering, now, tasks)
            except BaseException:
                if later is not None:
                    later.release()
                raise
            if later is None:
                return
            rest = later

    async def _without_buffer(self, segment: Segment) -> Segment:
        """The segment as bytes of its own, where a kept part could gather slices of more buffers than there are.

        An image that leaves zeros out puts a little of very many windows into one part. The planning gave this run
        made bytes instead of buffers then (`divide_memory`). Takes the segment over.
        """
        data, ledger = segment.data, self._context.ledger
        if not isinstance(data, Slice) or not data.pooled_bytes or not ledger.total:
            return segment
        try:
            charge = await ledger.charge(segment.length)
        except BaseException:
            segment.release()
            raise
        copy = charged_slice(bytes(data.view), charge)
        segment.release()
        return Segment(segment.length, copy)

    async def _begin(self, tasks: anyio.abc.TaskGroup) -> _Gathering:
        if self._next_part == len(self._body):
            raise self._too_long()
        part = self._body[self._next_part]
        self._next_part += 1
        gathering = _Gathering(part)
        if self._position_before > part.start and not self._plan.parts.single:
            gathering.cut = gathering.length = self._position_before - part.start
            self._gathering = gathering
            return gathering
        streamed = not self._plan.parts.single and self._plan.is_streamed(part)
        while self._flying and (
            self._flying >= self._plan.in_flight
            or (streamed and self._streaming)
            or (not streamed and self._flying_bytes + part.length > self._plan.memory)
        ):
            await self._landing()
        if streamed:
            await self._open()
            gathering.streamed = StreamedBody(
                part,
                self._upload.algorithms,
                replay=self._context.replay,
                in_thread=self._in_thread,
                on_replay=lambda start, end: self._context.emit(
                    PartReplayed(stage=self._context.name, number=part.number, from_bytes=start, to_bytes=end)
                ),
            )
            self._take_off(0)
            self._streaming = True
            tasks.start_soon(self._put_streamed, gathering, gathering.streamed)
        self._gathering = gathering
        return gathering

    def _too_long(self) -> StageError:
        planned = self._body[-1].end if self._body else self._plan.head_length
        return StageError("the image is longer than its encoder said", operation="write", planned=planned)

    async def _put_in(self, gathering: _Gathering, segment: Segment, tasks: anyio.abc.TaskGroup) -> None:
        self._position_before += segment.length
        if gathering.cut:
            gathering.length += segment.length
            segment.release()
            if gathering.length == gathering.part.length:
                self._gathering = None
                self._take_as_stored(gathering)
            return
        if gathering.streamed is not None:
            gathering.length += segment.length
            is_full = gathering.length == gathering.part.length
            if is_full:
                self._gathering = None  # before the last byte: the part's own task takes care of it from here
            await gathering.streamed.feed(segment)
            return
        gathering.add(await self._without_buffer(segment))
        if gathering.length == gathering.part.length and not self._plan.parts.single:
            await self._send(gathering, tasks)
            self._gathering = None

    # ---- sending ---------------------------------------------------------------------------------------------------

    async def _open(self) -> None:
        if not self._opened:
            if self._journal is not None:
                self._journal.note_state()
            self._opened = True  # before the answer: what was asked for may have to be removed
            upload_id = await self._upload.open()
            if self._journal is not None:
                self._journal.note_state()
            self._context.emit(UploadOpened(stage=self._context.name, uri=self._upload.uri, upload_id=upload_id))

    async def _send(self, gathering: _Gathering, tasks: anyio.abc.TaskGroup) -> None:
        await self._open()
        while self._flying >= self._plan.in_flight:
            await self._landing()
        self._take_off(gathering.held_bytes)
        tasks.start_soon(self._put_kept, gathering)

    def _take_off(self, held_bytes: int) -> None:
        self._flying += 1
        self._flying_bytes += held_bytes

    def _land(self, held_bytes: int) -> None:
        self._flying -= 1
        self._flying_bytes -= held_bytes
        self._landed.set()

    async def _landing(self) -> None:
        self._landed = anyio.Event()
        await self._landed.wait()

    async def _put_kept(self, gathering: _Gathering) -> None:
        held = gathering.held_bytes
        try:
            begun = self._context.clock.now()
            with self._context.meter.working():
                body = await self._kept(gathering.segments, gathering.length, self._upload.algorithms)
                earlier = self._stored_earlier(gathering.part, body)
                stored = earlier or await self._upload.put_part(gathering.part.number, body)
        finally:
            gathering.release()
            self._land(held)
        self._acknowledge(gathering, stored, None if earlier else body.attempts, begun)

    async def _put_streamed(self, gathering: _Gathering, body: StreamedBody) -> None:
        begun = self._context.clock.now()
        try:
            with self._context.meter.working():
                async with anyio.create_task_group() as helpers:
                    helpers.start_soon(body.serve)
                    earlier = await self._see_streamed(gathering.part, body)
                    stored = earlier or await self._put_body(gathering.part, body)
                    helpers.cancel_scope.cancel()
        except BaseExceptionGroup as group:
            raise first_error(group) from group
        finally:
            body.discard()
            self._streaming = False
            self._land(0)
        if self._context.replay is not None:
            self._context.replay.forget(gathering.part.start + body.length)
        self._acknowledge(gathering, stored, None if earlier else body.attempts, begun)

    async def _see_streamed(self, part: PlannedPart, body: StreamedBody) -> StoredPart | None:
        """Whether a streamed part is what an earlier process sent; else nothing of it is taken."""
        if part.number not in self._earlier:
            return None
        try:
            async for _ in body.chunks():
                pass
        except ImageEnded:
            body.shorten()
        return self._stored_earlier(part, body)

    async def _put_body(self, part: PlannedPart, body: StreamedBody) -> StoredPart:
        try:
            return await self._upload.put_part(part.number, body)
        except ImageEnded:
            # The announced length was a guess; what arrived is made again, with its real length.
            body.shorten()
            return await self._upload.put_part(part.number, body)

    def _stored_earlier(self, part: PlannedPart, body: Body) -> StoredPart | None:
        """The part as an earlier process stored it; None where there is none, or another that has to be replaced.

        Raises:
            SourceError: the disk gives other bytes than then, and what was sent can't be mixed with them.
        """
        earlier = self._earlier.pop(part.number, None)
        if earlier is None:
            return None
        sums = body.sums
        assert sums is not None  # all bytes were seen
        ours, then = sums_to_text(sums), sums_to_text(earlier.sums)
        common = ours.keys() & then.keys()
        if common and sums.length == earlier.length and all(ours[name] == then[name] for name in common):
            return earlier
        if self._journal is not None and self._journal.resends:
            return None
        raise SourceError(
            "the disk gives other bytes than an earlier process of this export sent",
            operation="resume",
            number=part.number,
            image_offset=part.start,
            length=sums.length,
            hint="An image of two moments would not boot or lose files. Export a snapshot, and start anew: --discard.",
        )

    def _take_as_stored(self, gathering: _Gathering) -> None:
        """A part whose beginning was made by an earlier process, which stored all of it."""
        stored = self._earlier.pop(gathering.part.number, None)
        if stored is None:
            raise StageError(
                "a part was to be continued that is not stored", operation="write", number=gathering.part.number
            )
        if stored.length != gathering.length:
            raise SourceError(
                "the image ends elsewhere than an earlier process of this export made it end",
                operation="resume",
                hint="The disk changed. Export a snapshot, and start anew: --discard.",
                number=gathering.part.number,
            )
        self._acknowledge(gathering, stored, None, self._context.clock.now())

    async def _kept(self, segments: list[Segment], length: int, algorithms: Algorithm) -> KeptBody:
        if length < MiB:
            return KeptBody(segments, sum_segments(segments, algorithms))
        sums = await in_thread(self._context.threads, lambda: sum_segments(segments, algorithms))
        return KeptBody(segments, sums)

    async def _in_thread(self, work: Callable[[], None]) -> None:
        await in_thread(self._context.threads, work)

    def _acknowledge(self, gathering: _Gathering, stored: StoredPart, attempts: int | None, begun: float) -> None:
        """Count a part that the store has; `attempts` is None where an earlier process sent it."""
        self._stored[gathering.part.number] = stored
        self._guest_bytes += gathering.guest_bytes
        self._context.progress.acknowledge(
            guest_bytes=gathering.guest_bytes, image_bytes=stored.length - gathering.cut, is_earlier=attempts is None
        )
        if attempts is None:
            return
        if self._journal is not None and gathering is not self._head:  # the head only where it is the whole image
            self._journal.note_part(gathering.part.start, gathering.guest_bytes, stored)
        self._context.emit(
            PartStored(
                stage=self._context.name,
                number=gathering.part.number,
                length_bytes=stored.length,
                guest_bytes=gathering.guest_bytes,
                attempts=attempts,
                elapsed_s=self._context.clock.now() - begun,
            )
        )

    # ---- the end ---------------------------------------------------------------------------------------------------

    async def _send_rest(self, tasks: anyio.abc.TaskGroup) -> Sealed | None:
        """Send what was gathered last. Returns the sealed object where one request was enough."""
        if self._head_position != self._plan.head_length:
            raise StageError(
                "the head of the image is missing, or longer than its encoder said",
                operation="write",
                expected=self._plan.head_length,
                got=self._head_position,
            )
        last, self._gathering = self._gathering, None
        self._head.guest_bytes += self._loose_guest_bytes
        if not self._opened:
            return await self._put_whole(last)
        if last is not None and last.cut:
            self._take_as_stored(last)
        elif last is not None and last.streamed is not None:
            last.streamed.end_image()
        elif last is not None:
            self._gathering = last
            await self._send(last, tasks)
            self._gathering = None
        if self._plan.head_length:
            head, self._head = self._head, _Gathering(self._head.part)
            try:
                await self._send(head, tasks)
            except BaseException:
                head.release()
                raise
        else:
            self._guest_bytes += self._head.guest_bytes
            self._context.progress.acknowledge(guest_bytes=self._head.guest_bytes, image_bytes=0)
        return None

    async def _put_whole(self, last: _Gathering | None) -> Sealed:
        whole = self._head
        if last is not None:
            for segment in last.segments:
                whole.add(segment)
            whole.guest_bytes += last.guest_bytes
        self._check_complete(whole.guest_bytes)
        self._opened = True
        begun = self._context.clock.now()
        try:
            with self._context.meter.working():
                body = await self._kept(whole.segments, whole.length, self._upload.algorithms)
                if self._journal is not None and body.sums is not None:
                    self._journal.note_state(whole={"length": whole.length, "sums": sums_to_text(body.sums)})
                sealed = await self._upload.put_whole(body)
        finally:
            whole.release()
        sums = body.sums
        assert sums is not None
        stored = StoredPart(number=1, length=whole.length, tag=sealed.tag, sums=sums)
        self._acknowledge(whole, stored, body.attempts, begun)
        return sealed

    async def _seal(self) -> Sealed:
        self._check_complete(self._guest_bytes)
        parts = [self._stored[number] for number in sorted(self._stored)]
        if sum(part.length for part in parts) != self._position:
            raise StageError("the parts do not add up to the image", operation="seal", expected=self._position)
        if self._journal is not None:
            self._journal.note_state(sealing=[part.number for part in parts])
        return await self._upload.seal(parts)

    def _check_complete(self, guest_bytes: int) -> None:
        if guest_bytes != self._context.disk_size:
            raise StageError(
                f"{guest_bytes} of {self._context.disk_size} guest bytes were written; nothing was committed",
                operation="seal",
            )
        layout = self._context.layout
        if layout is not None and layout.image_bytes is not None and layout.image_bytes != self._position:
            raise StageError(
                "the image has another length than its encoder said",
                operation="seal",
                expected=layout.image_bytes,
                got=self._position,
            )


async def abort_upload(upload: PartUpload, context: StageContext, cause: BaseException) -> None:
    """Remove what a failed or cancelled run stored, shielded and within ABORT_DEADLINE_S.

    Raises:
        LeftBehindError: it did not work; names the commands that do it.
    """
    failure = f"the store did not answer within {ABORT_DEADLINE_S:.0f} s"
    with anyio.move_on_after(ABORT_DEADLINE_S, shield=True):
        try:
            await upload.abort()
        except StoreError as error:
            failure = str(error)
        else:
            context.emit(UploadRemoved(uri=upload.uri, how="aborted"))
            return
    raise LeftBehindError(
        f"removing what was stored failed: {failure}",
        cause=cause,
        commands=upload.leftovers(),
        uri=upload.uri,
    ) from cause
