"""The bytes of one part: kept until the store has them, or passed on while they arrive and made again when needed."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass

import anyio

from pipeline.errors import PipelineError, SourceError, StageError
from pipeline.flow.buffers import Slice
from pipeline.flow.items import Piece
from pipeline.flow.stage import Replay
from pipeline.units import MiB
from stages.store.digests import ZEROS, Algorithm, Buffer, RunningSums, Sums
from stages.write.parts import PlannedPart

# What is handed to a socket at once. Half of it costs a tenth more CPU, twice of it gains nothing.
CHUNK = MiB


@dataclass(frozen=True, slots=True)
class Segment:
    """Some bytes of a part, in image order; owned by whoever holds it. `data` None: zeros."""

    length: int
    data: Slice | bytes | None

    @classmethod
    def of(cls, piece: Piece) -> Segment:
        """Take a piece's bytes over."""
        return cls(piece.length, piece.data)

    @property
    def held_bytes(self) -> int:
        """Memory that a ledger or pool counts for it."""
        return self.length if isinstance(self.data, Slice) else 0

    def split(self, at: int) -> tuple[Segment, Segment]:
        """Two segments instead of this one, which is used up."""
        rest = self.length - at
        if self.data is None:
            return Segment(at, None), Segment(rest, None)
        if isinstance(self.data, bytes):
            return Segment(at, self.data[:at]), Segment(rest, self.data[at:])
        first, second = self.data.share(0, at), self.data.share(at, self.length)
        self.data.release()
        return Segment(at, first), Segment(rest, second)

    def chunks(self) -> Iterator[memoryview]:
        """Borrowed views of at most CHUNK bytes; zeros come from one shared buffer."""
        if self.data is None:
            for start in range(0, self.length, CHUNK):
                yield ZEROS[: min(CHUNK, self.length - start)]
            return
        view = self.data.view if isinstance(self.data, Slice) else memoryview(self.data)
        for start in range(0, self.length, CHUNK):
            yield view[start : min(start + CHUNK, self.length)]

    def add_to(self, sums: RunningSums) -> None:
        """Sum the bytes. Threads: any."""
        if self.data is None:
            sums.update_zeros(self.length)
        else:
            sums.update(self.data.view if isinstance(self.data, Slice) else self.data)

    def release(self) -> None:
        """Give the bytes back."""
        if isinstance(self.data, Slice):
            self.data.release()


def sum_segments(segments: Sequence[Segment], algorithms: Algorithm) -> Sums:
    """The sums of segments one after the other. Threads: any."""
    sums = RunningSums(algorithms)
    for segment in segments:
        segment.add_to(sums)
    return sums.value()


class KeptBody:
    """A part that waits in memory, as long as it is not acknowledged. Its segments belong to whoever made it."""

    def __init__(self, segments: Sequence[Segment], sums: Sums) -> None:
        self._segments = segments
        self._sums = sums
        self.attempts = 0

    @property
    def length(self) -> int:
        """Bytes."""
        return self._sums.length

    @property
    def sums(self) -> Sums | None:
        """Known from the start."""
        return self._sums

    async def chunks(self) -> AsyncIterator[Buffer]:
        """Views of the segments; nothing is copied."""
        self.attempts += 1
        for segment in self._segments:
            for view in segment.chunks():
                yield view


class _Staging:
    """Copies of chunks, in memory that is used again as soon as nobody looks at it any more.

    A fresh block for every chunk costs three times the copying: the system clears its pages, and takes them back.
    """

    def __init__(self) -> None:
        self._blocks: list[bytearray] = []

    def copy(self, chunk: memoryview) -> memoryview:
        """The chunk, at most CHUNK bytes, in a block of its own. Valid as long as the view, or a part of it, lives."""
        copy = memoryview(self._free_block())[: chunk.nbytes]
        copy[:] = chunk  # to a view: assigned to the bytearray itself, it would be copied twice
        return copy

    def _free_block(self) -> bytearray:
        for block in self._blocks:
            try:
                # A bytearray refuses to change its length while a view of it lives, be it one in a transport.
                block.append(0)
            except BufferError:
                continue
            del block[CHUNK:]
            return block
        self._blocks.append(bytearray(CHUNK))
        return self._blocks[-1]


class ImageEnded(Exception):
    """The image ended inside a streamed part, whose announced length was too long. Never leaves the driver."""


class _Handover:
    """Passes segments from one task to another, one ahead of the one that is being looked at."""

    def __init__(self) -> None:
        self._segments: deque[tuple[Segment, Sums]] = deque()
        self._changed = anyio.Event()
        self.ended = False
        self.error: BaseException | None = None

    def _notify(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()

    async def put(self, segment: Segment, sums: Sums) -> None:
        """Append a segment with the sums of everything up to its end; waits while another one is waiting behind."""
        while len(self._segments) >= 2:
            await self._changed.wait()
        self._segments.append((segment, sums))
        self._notify()

    async def front(self) -> tuple[Segment, Sums] | None:
        """The first segment, which stays; None when there is no other to come."""
        while not self._segments:
            if self.error is not None:
                raise self.error
            if self.ended:
                return None
            await self._changed.wait()
        return self._segments[0]

    def drop_front(self) -> None:
        """Release the first segment."""
        segment, _ = self._segments.popleft()
        segment.release()
        self._notify()

    def end(self, error: BaseException | None = None) -> None:
        """There is no other segment to come."""
        self.ended = True
        self.error = error
        self._notify()

    def discard(self) -> None:
        """Release everything."""
        while self._segments:
            self.drop_front()


class StreamedBody:
    """A part too long to wait in memory: its bytes are passed on once, and made again where an attempt failed.

    One task feeds it, another serves replays (`serve`), and the store's client takes chunks, in a task of its own
    that may be cancelled at any await; so whatever has to be cleaned up lives in the first two.
    Bytes are copied once on their way out: a transport may still hold the last chunk when the next one is asked for,
    and by then the slice has gone back to its pool.

    Attributes:
        attempts: how often the store's client began.
    """

    def __init__(
        self,
        part: PlannedPart,
        algorithms: Algorithm,
        *,
        replay: Replay | None,
        in_thread: Callable[[Callable[[], None]], Awaitable[None]],
        on_replay: Callable[[int, int], None],
    ) -> None:
        """Prepare it; nothing moves.

        Args:
            in_thread: runs a function of >= 1 MiB of work in a worker thread.
            on_replay: told the image offsets [from, to) that are made again.
        """
        self.attempts = 0
        self._part = part
        self._algorithms = algorithms
        self._replay = replay
        self._in_thread = in_thread
        self._on_replay = on_replay
        self._length = part.length
        self._staging = _Staging()
        self._live = _Handover()
        self._running = RunningSums(algorithms)
        self._fed = 0
        self._passed = 0
        self._passed_sums = self._running.value()
        self._again: _Handover | None = None
        self._again_scope: anyio.CancelScope | None = None
        self._asked = anyio.Event()

    @property
    def length(self) -> int:
        """Bytes: as planned, or as they turned out to be."""
        return self._length

    @property
    def sums(self) -> Sums | None:
        """Known once every byte was fed."""
        return self._running.value() if self._fed == self._length else None

    async def feed(self, segment: Segment) -> None:
        """Pass bytes on; waits until the store took most of what came before. Takes the segment over."""
        try:
            await self._add(segment, self._running)
            self._fed += segment.length
            await self._live.put(segment, self._running.value())
        except BaseException:
            segment.release()
            raise
        if self._fed == self._length:
            self._live.end()

    def end_image(self) -> None:
        """No other byte comes: the attempt under way, or the next one, raises ImageEnded."""
        self._live.discard()
        self._live.end(ImageEnded())

    def finish(self) -> None:
        """No other byte comes, and nobody announced a length: the attempt under way ends here, whole."""
        self._length = self._fed
        self._live.end()

    def shorten(self) -> None:
        """Make the part as long as the image turned out to be; all of it is replayed from now on."""
        self._live.discard()
        self._live.end()
        self._length = self._passed = self._fed
        self._passed_sums = self._running.value()

    def discard(self) -> None:
        """Release what was fed and not passed on."""
        self._live.discard()
        if self._again is not None:
            self._again.discard()

    async def chunks(self) -> AsyncIterator[Buffer]:
        """First what has to be made again, then what arrives."""
        if self._live.error is not None:
            raise self._live.error
        self.attempts += 1
        mine = self.attempts
        if self._passed:
            again = self._ask_again()
            while (found := await again.front()) is not None:
                if self.attempts != mine:  # left over from an attempt that was given up
                    return
                for view in found[0].chunks():
                    yield self._staging.copy(view)
                if self._live.error is not None:
                    raise self._live.error
                again.drop_front()
        while (found := await self._live.front()) is not None:
            segment, sums = found
            if self.attempts != mine:
                return
            for view in segment.chunks():
                yield self._staging.copy(view)
            if self._live.error is not None:  # the image ended meanwhile, and the segment is gone
                raise self._live.error
            self._live.drop_front()
            self._passed += segment.length
            self._passed_sums = sums

    def _ask_again(self) -> _Handover:
        if self._again_scope is not None:
            self._again_scope.cancel()  # the replay for an attempt that failed
        if self._again is not None:
            self._again.discard()
        self._again = _Handover()
        self._asked.set()
        return self._again

    async def serve(self) -> None:
        """Make bytes again whenever an attempt asks for them; runs until it is cancelled."""
        while True:
            await self._asked.wait()
            self._asked = anyio.Event()
            again = self._again
            assert again is not None
            with anyio.CancelScope() as self._again_scope:
                try:
                    await self._make_again(again)
                except PipelineError as error:
                    again.end(error)
                finally:
                    self._again_scope = None
                    if not again.ended or again is not self._again:
                        again.discard()

    async def _make_again(self, again: _Handover) -> None:
        start, end = self._part.start, self._part.start + self._passed
        expected = self._passed_sums
        if self._replay is None:
            raise StageError(
                "nobody can make the bytes of a part again", operation="put_part", number=self._part.number
            )
        self._on_replay(start, end)
        sums = RunningSums(self._algorithms)
        position = start
        async with _Closing(self._replay.pieces(start, end)) as made:
            async for piece in made:
                segment = Segment.of(piece)
                try:
                    if piece.offset != position or piece.end > end:
                        raise StageError("a replay left its range", operation="put_part", offset=piece.offset)
                    position = piece.end
                    await self._add(segment, sums)
                    # Looked at before the last bytes go on: the store must not get a whole part of another disk.
                    if position == end and sums.value() != expected:
                        raise SourceError(
                            "the disk gave other bytes than the first time",
                            operation="replay",
                            image_offset=start,
                            length=end - start,
                            hint="The disk changed during the export. Export a snapshot, or stop what writes to it.",
                        )
                    await again.put(segment, sums.value())
                except BaseException:
                    segment.release()
                    raise
        if position != end:
            raise StageError("a replay ended early", operation="put_part", expected=end, got=position)
        again.end()

    async def _add(self, segment: Segment, sums: RunningSums) -> None:
        if segment.length >= MiB:
            await self._in_thread(lambda: segment.add_to(sums))
        else:
            segment.add_to(sums)


class _Closing:
    """Closes an async generator in the task that used it; other iterators need no closing."""

    def __init__(self, pieces: AsyncIterator[Piece]) -> None:
        self._pieces = pieces

    async def __aenter__(self) -> AsyncIterator[Piece]:
        return self._pieces

    async def __aexit__(self, *_: object) -> None:
        close = getattr(self._pieces, "aclose", None)
        if close is not None:
            await close()
