"""The driver of numbered parts against a store in memory: order, conservation, memory, failure, cancellation."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from pipeline.errors import LeftBehindError, PlanError, SourceError, StageError, StoreError
from pipeline.events import Event, PartReplayed, PartStored, RetryScheduled, UploadOpened, UploadRemoved
from pipeline.flow.buffers import Ledger, loose_slice
from pipeline.flow.items import Piece
from pipeline.flow.orders import PartLimits
from pipeline.flow.retry import Retry, RetryPolicy
from pipeline.flow.stage import KeptPart, SinkRequest, StageContext, Start
from pipeline.units import KiB, MiB
from stages.store.digests import Algorithm
from stages.write.bodies import KeptBody, Segment, StreamedBody, sum_segments
from stages.write.driver import DriverPlan, PartDriver, plan_driver
from stages.write.faulty import Faulty
from stages.write.kept import PartJournal, sums_to_text
from stages.write.memory import MemoryStore
from stages.write.parts import PlannedPart
from stages.write.retrying import Retrying
from stages.write.shapes import Body, PartUpload, Sealed, StoredPart
from tests.write.images import Image, ImageReplay, QuickClock, make_context, mixed

# A store where everything is a hundred times smaller than in S3, so that growth, parts and streaming are tested fast.
SMALL = PartLimits(part_min=256 * KiB, part_max=64 * MiB, parts_max=10_000, whole_max=MiB)
KEPT = 64 * MiB  # memory in which every part is kept
STREAMED = 4 * MiB  # memory in which the 8 MiB parts are streamed


def plan_for(
    image: Image, context: StageContext, *, memory: int = KEPT, limits: PartLimits = SMALL, longest: int | None = None
) -> DriverPlan:
    """What planning would say."""
    layout = image.layout(image_bytes_max=longest or image.size)
    return plan_driver(limits, SinkRequest(layout=layout, order=context.order, memory=memory), parts_in_flight=4)


async def store_image(
    image: Image,
    upload: PartUpload,
    *,
    events: list[Event] | None = None,
    disk_size: int | None = None,
    memory: int = KEPT,
    longest: int | None = None,
    pieces: AsyncIterator[Piece] | None = None,
    replay: ImageReplay | None = None,
    ledger: Ledger | None = None,
    attempts: int = 6,
) -> tuple[Sealed, StageContext]:
    """Drive one image into an upload, with retries."""
    seen = events if events is not None else []
    clock = QuickClock()
    made_again = replay or ImageReplay(image.data)
    context = make_context(image, events=seen, clock=clock, disk_size=disk_size, replay=made_again)
    plan = plan_for(image, context, memory=memory, longest=longest)
    made_again.boundaries = plan.sink.boundaries
    retry = Retry(
        RetryPolicy(attempts=attempts), clock=clock, emit=seen.append, stage="write.test", chance=random.Random(1)
    )
    driver = PartDriver(Retrying(upload, retry), context, plan)
    return await driver.store(pieces or image.pieces(ledger)), context


def temporary(**more: object) -> StoreError:
    """A failure for the moment."""
    return StoreError("503 SlowDown", temporary=True, status=503, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("head", [0, 300 * KiB])
@pytest.mark.parametrize("memory", [KEPT, STREAMED])
async def test_the_stored_object_is_the_image(head: int, memory: int) -> None:
    """In sequence and with the head last; parts kept and parts streamed."""
    image = mixed(30 * MiB + 4321, head_length=head)
    store, events = MemoryStore(SMALL), list[Event]()
    ledger = Ledger(12 * MiB if memory == KEPT else memory)
    sealed, context = await store_image(
        image, store.upload("a"), memory=min(memory, ledger.total), events=events, ledger=ledger
    )
    assert store.objects == {"a": image.data}
    assert sealed.size == image.size
    assert store.open_uploads == set()
    assert ledger.charged == 0, "every slice came back"
    assert (context.progress.acked_bytes, context.progress.stored_bytes) == (image.guest_bytes, image.size)
    stored = [event for event in events if isinstance(event, PartStored)]
    assert sum(event.guest_bytes for event in stored) == image.guest_bytes
    assert sum(event.length_bytes for event in stored) == image.size
    if head:
        assert [number for name, number in store.requests if name == "put_part"][-1] == 1


@pytest.mark.parametrize("head", [0, 4096, 300 * KiB])
async def test_a_small_image_goes_up_in_one_request(head: int) -> None:
    """Whether that was sure in planning, or turned out when the image ended before the first part was full."""
    image = mixed(600 * KiB, head_length=head)
    for longest in (image.size, 40 * MiB) if head != 4096 else (image.size,):
        store, events = MemoryStore(SMALL), list[Event]()
        _, context = await store_image(image, store.upload("a"), longest=longest, events=events)
        assert store.requests == [("put_whole", 0)]
        assert store.objects == {"a": image.data}
        assert context.progress.acked_bytes == image.guest_bytes
        assert not [event for event in events if isinstance(event, UploadOpened)]


async def test_an_image_that_ends_at_the_end_of_a_part_needs_no_empty_part() -> None:
    image = mixed(24 * MiB)
    store = MemoryStore(SMALL)
    await store_image(image, store.upload("a"), longest=100 * MiB)
    assert sorted(number for name, number in store.requests if name == "put_part") == [1, 2, 3]
    assert store.objects == {"a": image.data}


async def test_parts_grow_late_and_hold_the_worst_case() -> None:
    """Twenty parts at most, for an image that may be 300 MiB and turns out shorter."""
    limits = replace(SMALL, parts_max=20, part_max=20 * MiB)
    image = mixed(50 * MiB, head_length=300 * KiB)
    store, context = MemoryStore(limits), make_context(image)
    plan = plan_for(image, context, limits=limits, longest=300 * MiB)
    lengths = [part.length for part in plan.parts.body]
    assert lengths[0] == 8 * MiB
    assert lengths[0] < lengths[-2] <= limits.part_max
    await PartDriver(store.upload("a"), context, plan).store(image.pieces())
    assert store.objects == {"a": image.data}


async def test_writer_refuses_to_commit_a_short_disk() -> None:
    """A source that ends early must not become a finished image."""
    for longest, size in ((40 * MiB, 30 * MiB), (MiB, 800 * KiB)):
        image, store = mixed(size), MemoryStore(SMALL)
        with pytest.raises(StageError, match=f"{image.guest_bytes} of {image.guest_bytes + 512} guest bytes"):
            await store_image(image, store.upload("a"), disk_size=image.guest_bytes + 512, longest=longest)
        assert store.objects == {}
        assert store.open_uploads == set()
        assert ("seal", 0) not in store.requests


async def test_guest_bytes_of_pieces_without_image_bytes_are_counted() -> None:
    """An encoder may account for a hole with a piece of no length."""
    image = mixed(20 * MiB, head_length=300 * KiB)

    async def pieces() -> AsyncIterator[Piece]:
        yield Piece(0, 0, None, 1000)
        async for piece in image.pieces():
            yield piece
        yield Piece(0, 0, None, 24)

    store = MemoryStore(SMALL)
    _, context = await store_image(image, store.upload("a"), pieces=pieces(), disk_size=image.guest_bytes + 1024)
    assert context.progress.acked_bytes == image.guest_bytes + 1024


def _gap(pieces: list[Piece]) -> list[Piece]:
    return pieces[:3] + pieces[4:]


def _swapped(pieces: list[Piece]) -> list[Piece]:
    return [pieces[1], pieces[0], *pieces[2:]]


def _twice(pieces: list[Piece]) -> list[Piece]:
    again = pieces[2]
    return [*pieces[:3], Piece(again.offset, again.length, None, 0), *pieces[3:]]


def _head_first(pieces: list[Piece]) -> list[Piece]:
    return [pieces[-2], pieces[-1], *pieces[:-2]]


def _no_head(pieces: list[Piece]) -> list[Piece]:
    return pieces[:-1]


def _too_long(pieces: list[Piece]) -> list[Piece]:
    end = pieces[-3].end
    return [*pieces[:-2], Piece(end, 200 * MiB, None, 0), *pieces[-2:]]


def _crossing(pieces: list[Piece]) -> list[Piece]:
    last = pieces[-1]
    return [*pieces[:-1], Piece(last.offset, last.length + 4096, None, last.guest_bytes)]


@pytest.mark.parametrize("change", [_gap, _swapped, _twice, _head_first, _no_head, _too_long, _crossing])
async def test_pieces_that_break_the_order_are_never_committed(change: object) -> None:
    image = mixed(30 * MiB, head_length=300 * KiB)
    given = [piece async for piece in image.pieces()]

    async def pieces() -> AsyncIterator[Piece]:
        for piece in change(given):  # type: ignore[operator]
            yield piece

    store = MemoryStore(SMALL)
    with pytest.raises(StageError):
        await store_image(image, store.upload("a"), pieces=pieces())
    assert store.objects == {}
    assert store.open_uploads == set()


class Noted:
    """The journal of an earlier process that stored the first parts."""

    id, mark, discards, resends = "1", 0, False, False

    def __init__(self, start: Start, parts: Mapping[int, KeptPart]) -> None:
        self.start = start
        self.parts = parts
        self.upload = {"id": "1"}
        self.noted: list[int] = []

    def note_upload(self, state: Mapping[str, Any]) -> None:
        pass

    def note_part(self, part: KeptPart) -> None:
        self.noted.append(part.number)

    def note_mark(self, position: int) -> None:
        raise AssertionError("parts have no mark")

    def drop_parts(self, numbers: Iterable[int]) -> None:
        raise AssertionError("the store has them all")

    def begin_anew(self, reason: str) -> None:
        raise AssertionError(reason)

    def keeps(self, error: BaseException) -> bool:
        return False


@pytest.mark.parametrize("known", [2, 3])
async def test_part_in_which_a_resumed_run_begins_counts_from_there_and_is_not_sent(known: int) -> None:
    """The checkpoint lies inside the second part, which is stored: what is made again ends it, or is compared."""
    image = Image([(MiB // 2, True)] * 40)
    store = MemoryStore(SMALL)
    upload = store.upload("a")
    context = make_context(image)
    plan = plan_for(image, context)
    await upload.open()
    kept = {}
    for part in plan.parts.body[:known]:
        segment = Segment(part.length, loose_slice(image.data[part.start : part.end]))
        stored = await upload.put_part(part.number, KeptBody([segment], sum_segments([segment], Algorithm.MD5)))
        kept[part.number] = KeptPart(
            number=part.number,
            start=part.start,
            length=part.length,
            guest_bytes=2 * part.length,
            tag=stored.tag,
            sums=sums_to_text(stored.sums),
        )
    begins = next(offset for offset in range(0, image.size, MiB // 2) if offset > plan.parts.body[1].start)
    assert begins < plan.parts.body[1].end
    journal = Noted(Start(position=begins, guest_bytes=2 * begins), kept)
    pieces = [piece async for piece in image.pieces() if piece.offset >= begins]

    async def rest() -> AsyncIterator[Piece]:
        for piece in pieces:
            yield piece

    store.requests.clear()
    await PartDriver(upload, context, plan, PartJournal(journal, dict)).store(rest())
    assert store.objects == {"a": image.data}
    assert context.progress.stored_bytes == image.size - begins
    assert context.progress.acked_bytes == image.guest_bytes - 2 * begins
    sent = [number for name, number in store.requests if name == "put_part"]
    assert sent == journal.noted == list(range(known + 1, len(plan.parts.body) + 1))


async def test_several_parts_are_in_flight_and_never_more_than_asked_for() -> None:
    image = mixed(80 * MiB, zeros=False)
    flying, most = 0, 0

    class Watched(Faulty):
        async def put_part(self, number: int, body: Body) -> StoredPart:
            nonlocal flying, most
            flying += 1
            most = max(most, flying)
            try:
                for _ in range(50):
                    await anyio.lowlevel.checkpoint()
                return await super().put_part(number, body)
            finally:
                flying -= 1

    store = MemoryStore(SMALL)
    await store_image(image, Watched(store.upload("a"), on="abort"))
    assert most == 4
    most = 0
    await store_image(image, Watched(store.upload("b"), on="abort"), memory=25 * MiB)
    assert most == 2, "three parts of 8 MiB fit, and one of them is being gathered"


class Slow(Faulty):
    """Parts take a while, so that they heap up."""

    async def put_part(self, number: int, body: Body) -> StoredPart:
        for _ in range(300):
            await anyio.lowlevel.checkpoint()
        return await super().put_part(number, body)


async def test_memory_of_parts_stays_within_their_share() -> None:
    """The chain may take what it wants from a generous ledger; the writer still holds no more than it said."""
    limits = replace(SMALL, parts_max=20, part_max=20 * MiB)
    image = mixed(120 * MiB, zeros=False)
    ledger, store, context = Ledger(300 * MiB), MemoryStore(limits), make_context(image)
    plan = plan_for(image, context, limits=limits, longest=340 * MiB, memory=60 * MiB)
    assert plan.in_flight == 4
    await PartDriver(Slow(store.upload("a"), on="abort"), context, plan).store(image.pieces(ledger))
    assert store.objects == {"a": image.data}
    assert 40 * MiB < ledger.peak <= 60 * MiB + 2 * (3 * MiB + 17), "parts, and what straddles their ends"


# ---- failures ------------------------------------------------------------------------------------------------------


async def test_a_temporary_failure_is_tried_again_and_told() -> None:
    image, store, events = mixed(40 * MiB, head_length=300 * KiB), MemoryStore(SMALL), list[Event]()
    upload = Faulty(store.upload("a"), on="put_part", number=3, error=temporary(), times=3)
    await store_image(image, upload, events=events)
    assert store.objects == {"a": image.data}
    retries = [event for event in events if isinstance(event, RetryScheduled)]
    assert [event.attempt for event in retries] == [2, 3, 4]
    attempts = {event.number: event.attempts for event in events if isinstance(event, PartStored)}
    assert attempts[3] == 1, "the body was taken once: the failures came before it"


@pytest.mark.parametrize("operation", ["open", "put_part", "seal"])
async def test_a_lost_answer_is_survived(operation: str) -> None:
    """The store did it, and nobody heard."""
    image = mixed(20 * MiB)
    store = MemoryStore(SMALL)
    upload = Faulty(store.upload("a"), on=operation, error=temporary(), when="after")  # type: ignore[arg-type]
    await store_image(image, upload)
    assert store.objects == {"a": image.data}


@pytest.mark.parametrize("operation", ["open", "put_part", "seal", "put_whole"])
async def test_a_permanent_failure_aborts_at_once(operation: str) -> None:
    image, events = mixed(900 * KiB if operation == "put_whole" else 40 * MiB), list[Event]()
    store = MemoryStore(SMALL)
    denied = StoreError("AccessDenied", status=403, operation=operation)
    upload = Faulty(store.upload("a"), on=operation, error=denied, call=2 if operation == "put_part" else None)  # type: ignore[arg-type]
    ledger = Ledger(64 * MiB)
    with pytest.raises(StoreError, match="AccessDenied"):
        await store_image(image, upload, events=events, ledger=ledger)
    assert upload.fired == 1, "a permanent failure is not tried again"
    assert store.objects == {}
    assert store.open_uploads == set()
    assert [event.how for event in events if isinstance(event, UploadRemoved)] == ["aborted"]


async def test_a_dead_store_ends_the_run_within_its_deadline() -> None:
    """Whatever attempts are left."""
    image, store, events = mixed(40 * MiB), MemoryStore(SMALL), list[Event]()
    upload = Faulty(store.upload("a"), on="put_part", error=temporary(), times=10**9)
    with pytest.raises(StoreError, match="SlowDown"):
        await store_image(image, upload, events=events, attempts=10**6)
    waited = sum(event.wait_s for event in events if isinstance(event, RetryScheduled))
    assert waited <= 4 * 100, "four parts in flight share one clock"
    assert store.open_uploads == set()


async def test_an_abort_that_fails_names_what_is_left() -> None:
    image, store = mixed(40 * MiB), MemoryStore(SMALL)
    denied = StoreError("AccessDenied", status=403)
    failing = Faulty(store.upload("a"), on="put_part", call=3, error=denied)
    upload = Faulty(failing, on="abort", error=StoreError("the network is gone", temporary=True), times=10**9)
    with pytest.raises(LeftBehindError) as caught:
        await store_image(image, upload)
    assert caught.value.cause is denied
    assert caught.value.commands == ("memory-store abort upload-1",)


@pytest.mark.parametrize("size", [800 * KiB, 20 * MiB])
@pytest.mark.parametrize("when", ["before", "after"])
async def test_cancelled_at_any_call_nothing_is_left(size: int, when: str) -> None:
    """Cancel at the n-th call of the store for every n until the run succeeds."""
    image = mixed(size, head_length=300 * KiB)
    for call in range(1, 100):
        store, events = MemoryStore(SMALL), list[Event]()
        ledger = Ledger(64 * MiB)
        with anyio.CancelScope() as scope:
            upload = Faulty(store.upload("a"), on="any", call=call, act=scope.cancel, when=when)  # type: ignore[arg-type]
            await store_image(image, upload, events=events, ledger=ledger)
        assert store.open_uploads == set()
        assert ledger.charged == 0
        if not scope.cancelled_caught:
            assert store.objects == {"a": image.data}
            assert call > 1
            return
        assert store.objects == {}
    raise AssertionError("it never succeeded")


# ---- streamed parts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lost", [0, 1, 3 * MiB, 7 * MiB, 8 * MiB - 1])
async def test_a_streamed_part_is_replayed_where_an_attempt_failed(lost: int) -> None:
    image, store, events = mixed(40 * MiB, head_length=300 * KiB), MemoryStore(SMALL), list[Event]()
    replay = ImageReplay(image.data)
    lose = temporary(retry_after_s=0.0)
    upload = Faulty(store.upload("a"), on="put_part", number=3, error=lose, after_bytes=lost, times=2)
    await store_image(image, upload, memory=STREAMED, events=events, replay=replay, ledger=Ledger(STREAMED))
    assert store.objects == {"a": image.data}
    replays = [event for event in events if isinstance(event, PartReplayed)]
    assert len(replays) == (2 if lost >= 3 * MiB else len(replays))
    start = 300 * KiB + 8 * MiB
    assert all(asked[0] == start and asked[1] <= start + max(lost, MiB) + 3 * MiB for asked in replay.asked)
    assert replay.forgotten >= image.size - 8 * MiB


@pytest.mark.parametrize("behind", [0, 1, 3])
async def test_bytes_that_a_transport_still_holds_are_not_overwritten(behind: int) -> None:
    """Transports of later Pythons, and TLS, look at a chunk when they were given others already."""
    image = Image([(MiB + 5, True), (300, True), (3 * MiB, True), (MiB, False), (2 * MiB, True)])

    async def in_this_thread(work: Callable[[], None]) -> None:
        work()

    part = PlannedPart(1, 0, image.size)
    body = StreamedBody(part, Algorithm.MD5, replay=None, in_thread=in_this_thread, on_replay=lambda start, end: None)
    sent, held, blocks = bytearray(), deque[memoryview](), set[int]()

    async def send() -> None:
        async for chunk in body.chunks():
            held.append(memoryview(chunk)[:])
            blocks.add(id(memoryview(chunk).obj))
            del chunk
            while len(held) > behind:
                sent.extend(held.popleft())

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(send)
        async for piece in image.pieces():
            await body.feed(Segment.of(piece))
    for rest in held:
        sent.extend(rest)
    assert bytes(sent) == image.data
    assert len(blocks) <= behind + 2, "memory is used again"


async def test_a_streamed_part_whose_length_was_a_guess_is_sent_again_with_the_right_one() -> None:
    for size in (20 * MiB + 1, 9 * MiB, 100_000):
        image, store, events = mixed(size), MemoryStore(SMALL), list[Event]()
        replay = ImageReplay(image.data)
        await store_image(image, store.upload("a"), memory=STREAMED, longest=100 * MiB, events=events, replay=replay)
        assert store.objects == {"a": image.data}
        assert replay.asked == [(size // (8 * MiB) * 8 * MiB, size)]
        assert [event.from_bytes for event in events if isinstance(event, PartReplayed)] == [replay.asked[0][0]]


async def test_a_guessed_length_and_failures_together_still_give_the_image() -> None:
    image = mixed(20 * MiB + 1, head_length=300 * KiB)
    for after in (0, MiB, 4 * MiB + 1 - 300 * KiB):
        store = MemoryStore(SMALL)
        lose = temporary(retry_after_s=0.0)
        upload = Faulty(store.upload("a"), on="put_part", number=4, error=lose, after_bytes=after, times=3, call=2)
        await store_image(image, upload, memory=STREAMED, longest=100 * MiB)
        assert store.objects == {"a": image.data}


@pytest.mark.parametrize("where", [0, 2 * MiB, 4 * MiB])
async def test_a_disk_that_changed_before_a_replay_ends_the_run(where: int) -> None:
    image, store = mixed(40 * MiB, zeros=False), MemoryStore(SMALL)
    changed = bytearray(image.data)
    changed[8 * MiB + where] ^= 1
    replay = ImageReplay(bytes(changed))
    lose = temporary(retry_after_s=0.0)
    upload = Faulty(store.upload("a"), on="put_part", number=2, error=lose, after_bytes=8 * MiB)
    with pytest.raises(SourceError, match="other bytes than the first time"):
        await store_image(image, upload, memory=STREAMED, replay=replay)
    assert store.objects == {}
    assert store.open_uploads == set()


async def test_a_replay_that_fails_ends_the_run_with_its_own_error() -> None:
    image, store = mixed(40 * MiB), MemoryStore(SMALL)
    replay = ImageReplay(image.data)
    replay.fails = True
    upload = Faulty(store.upload("a"), on="put_part", number=2, error=temporary(retry_after_s=0.0), after_bytes=4 * MiB)
    with pytest.raises(SourceError, match="the source is gone"):
        await store_image(image, upload, memory=STREAMED, replay=replay)
    assert store.objects == {}
    assert store.open_uploads == set()


async def test_cancelled_at_any_call_of_a_streamed_run_nothing_is_left() -> None:
    image = mixed(20 * MiB, head_length=300 * KiB)
    for call in range(1, 100):
        store, ledger = MemoryStore(SMALL), Ledger(STREAMED)
        with anyio.CancelScope() as scope:
            upload = Faulty(store.upload("a"), on="any", call=call, act=scope.cancel, after_bytes=2 * MiB)
            await store_image(image, upload, memory=STREAMED, longest=100 * MiB, ledger=ledger)
        assert store.open_uploads == set()
        assert ledger.charged == 0
        if not scope.cancelled_caught:
            assert store.objects == {"a": image.data}
            return
        assert store.objects == {}
    raise AssertionError("it never succeeded")


def test_a_head_that_does_not_fit_into_memory_is_refused() -> None:
    image = Image([(20 * MiB, True)], head_length=10 * MiB)
    layout = image.layout()
    context_order = make_context(image).order
    with pytest.raises(PlanError, match="have to be kept until its end"):
        plan_driver(SMALL, SinkRequest(layout=layout, order=context_order, memory=6 * MiB), parts_in_flight=8)


async def test_bytes_of_metadata_are_stored_like_slices() -> None:
    image = Image([(9 * MiB, True), (100, True), (3 * MiB, True)])

    async def pieces() -> AsyncIterator[Piece]:
        view = memoryview(image.data)
        yield Piece(0, 9 * MiB, loose_slice(view[: 9 * MiB]), 18 * MiB)
        yield Piece(9 * MiB, 100, bytes(view[9 * MiB : 9 * MiB + 100]), 200)
        yield Piece(9 * MiB + 100, 3 * MiB, bytes(view[9 * MiB + 100 :]), 6 * MiB)

    store = MemoryStore(SMALL)
    await store_image(image, store.upload("a"), pieces=pieces())
    assert store.objects == {"a": image.data}


class Lying:
    """A store whose answers do not fit what it was sent."""

    def __init__(self, upload: PartUpload, about: str) -> None:
        self._upload = upload
        self._about = about

    def __getattr__(self, name: str) -> object:
        return getattr(self._upload, name)

    async def put_part(self, number: int, body: Body) -> StoredPart:
        stored = await self._upload.put_part(number, body)
        return replace(stored, length=stored.length - 1) if self._about == "a part" and number == 2 else stored

    async def put_whole(self, body: Body) -> Sealed:
        sealed = await self._upload.put_whole(body)
        return replace(sealed, size=sealed.size - 1)

    async def seal(self, parts: list[StoredPart]) -> Sealed:
        sealed = await self._upload.seal(parts)
        return replace(sealed, size=sealed.size + 1) if self._about == "the object" else sealed


@pytest.mark.parametrize("about, size", [("a part", 30 * MiB), ("the object", 30 * MiB), ("the object", 600 * KiB)])
async def test_store_that_tells_another_length_than_was_sent_is_not_believed(about: str, size: int) -> None:
    image = mixed(size)
    upload: PartUpload = Lying(MemoryStore(SMALL).upload("a"), about)  # type: ignore[assignment]
    with pytest.raises((StageError, StoreError), match=r"do not add up to the image|another size than the image"):
        await store_image(image, upload)


@pytest.mark.parametrize("size", [30 * MiB, 600 * KiB])
async def test_image_of_another_length_than_its_encoder_said_is_never_committed(size: int) -> None:
    image, store = mixed(size), MemoryStore(SMALL)
    context = make_context(image)
    assert context.layout is not None
    context = replace(context, layout=replace(context.layout, image_bytes=image.size + 1))
    with pytest.raises(StageError, match="another length than its encoder said"):
        await PartDriver(store.upload("a"), context, plan_for(image, context)).store(image.pieces())
    assert store.objects == {}
    assert store.open_uploads == set()
