"""Making image bytes again: checkpoints at the places a sink asked for, and the replay from them.

Where a compressor stands behind the encoder, a checkpoint is a pair: the compressor's state at the begin of a window,
and the encoder's state at or before the image byte with which that window begins. The replay runs encoder and
compressor one behind the other, and drops what the encoder makes before that byte.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import anyio

from pipeline.errors import StageError
from pipeline.flow.buffers import Ledger, Memory, Pool
from pipeline.flow.items import Block, Piece
from pipeline.flow.parallel import in_thread
from pipeline.flow.stage import Compressor, Encoder, FunctionStage, Source, loader_of
from pipeline.units import MiB

# How far behind the last byte one block's pieces can reach beyond twice its length: tables and padding. Larger only
# takes a few more checkpoints that are thrown away.
_TABLES_REACH = 8 * MiB
# How far an encoder may be ahead of the compressor behind it before its states are not kept in time, and a replay
# begins further back than it has to. Larger only takes a few more states.
_COMPRESSOR_REACH = 256 * MiB


@dataclass(frozen=True, slots=True)
class Mark:
    """An encoder's state before the block at `guest_offset`, when its next image byte was `position`."""

    position: int
    guest_offset: int
    state: bytes


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """From where image bytes can be made again.

    Attributes:
        mark: where the encoder begins.
        window_offset, state: of the compressor, where there is one: the byte of its input with which its next window
            begins, and its state there.
    """

    mark: Mark
    window_offset: int = 0
    state: bytes | None = None


class Checkpoints:
    """Keeps, for every boundary that the sink named, the last state before it.

    A state is taken only when the next block may reach a boundary, and dropped when it did not, so the cost does not
    grow with the disk.
    """

    def __init__(self, boundaries: tuple[int, ...], *, skips_grow: bool = True) -> None:
        """Keep states for these image offsets, ascending. `skips_grow`: as the encoder's layout says."""
        self._boundaries = boundaries
        self._skips_grow = skips_grow
        self._next = 0
        self._candidate: Checkpoint | None = None
        self._kept: dict[int, Checkpoint] = {}
        self._guest_end = 0

    def before(self, encoder: Encoder[Any], block: Block) -> None:
        """Called before every block is placed."""
        self._guest_end = block.end
        # A state for each of many long skips cost 9 s of processor time on 2 TiB in clusters of 2 KiB.
        grows = self._skips_grow or any(run.is_data for run in block.runs)
        self._take(encoder, block.offset, (2 * block.length if grows else 0) + _TABLES_REACH)

    def before_end(self, encoder: Encoder[Any]) -> None:
        """Called before the encoder finishes."""
        self._take(encoder, self._guest_end, 1 << 62)

    def before_window(self, compressor: Compressor[Any], mark: Mark | None, offset: int, *, reach: int) -> None:
        """Called before a compressor's window at image `offset` is placed, and before it finishes.

        Args:
            mark: the encoder's state from which `offset` can be made; None where no boundary was named.
            reach: what it places now is not longer.
        """
        wanted = mark is not None and self.is_near(compressor.position + reach)
        self._candidate = Checkpoint(mark, offset, compressor.checkpoint()) if wanted and mark is not None else None

    def is_near(self, position: int) -> bool:
        """Whether a boundary lies before this image offset that was not passed yet."""
        return self._next < len(self._boundaries) and self._boundaries[self._next] < position

    @property
    def are_wanted(self) -> bool:
        """Whether a boundary is still to come."""
        return self._next < len(self._boundaries)

    def placed(self, position: int) -> None:
        """Called for every piece before it goes on; binds the state taken before to the boundaries that it passes."""
        while self._next < len(self._boundaries) and self._boundaries[self._next] < position:
            if self._candidate is not None:
                self._kept[self._boundaries[self._next]] = self._candidate
            self._next += 1

    def at(self, image_offset: int) -> Checkpoint:
        """The state to start from for this image offset."""
        known = sorted(self._kept)
        index = bisect_right(known, image_offset) - 1
        if index < 0:
            raise StageError("there is no checkpoint to make these image bytes from", offset=image_offset)
        return self._kept[known[index]]

    def forget(self, below: int) -> None:
        """No image byte below this offset is asked for any more."""
        known = sorted(self._kept)
        for boundary, following in pairwise(known):
            if following <= below:
                del self._kept[boundary]

    def _take(self, encoder: Encoder[Any], guest_offset: int, reach: int) -> None:
        self._candidate = None
        # The first block too, whatever its length: an encoder may place all of its tables before it.
        if self.are_wanted and (not guest_offset or self.is_near(encoder.position + reach)):
            self._candidate = Checkpoint(Mark(encoder.position, guest_offset, encoder.checkpoint()))


class Marks:
    """The encoder's states for the compressor behind it: the last one at or before each window that is gathered.

    Called like Checkpoints by the segment that runs the encoder, which is ahead of the compressor.
    """

    def __init__(self, checkpoints: Checkpoints, compressor: Compressor[Any]) -> None:
        self._checkpoints = checkpoints
        self._compressor = compressor
        self._kept: deque[Mark] = deque()
        self._guest_end = 0

    def before(self, encoder: Encoder[Any], block: Block) -> None:
        """Called before every block is placed."""
        self._guest_end = block.end
        self._take(encoder, block.offset)

    def before_end(self, encoder: Encoder[Any]) -> None:
        """Called before the encoder finishes."""
        self._take(encoder, self._guest_end)

    def placed(self, position: int) -> None:
        """Nothing to bind: the compressor decides."""

    def at(self, offset: int) -> Mark | None:
        """The last state from which image byte `offset` can be made. Asked with ascending offsets."""
        while len(self._kept) > 1 and self._kept[1].position <= offset:
            self._kept.popleft()
        return self._kept[0] if self._kept else None

    def _take(self, encoder: Encoder[Any], guest_offset: int) -> None:
        if not self._checkpoints.are_wanted:
            return
        if not self._kept or self._checkpoints.is_near(self._compressor.position + _COMPRESSOR_REACH):
            self._kept.append(Mark(encoder.position, guest_offset, encoder.checkpoint()))


class SourceReplay:
    """Makes a stretch of the image once more, one window after the other, with memory of its own.

    Args:
        make_encoder: a fresh encoder with the options and layout of the run.
        window, made_max: a replay uses two buffers and two charges of these sizes, beside those of the chain.
        make_compressor: a fresh compressor, where the chain has one.
        compressed_max: two charges of this size more.
    """

    def __init__(
        self,
        *,
        source: Source,
        functions: list[FunctionStage[Any]],
        make_encoder: Callable[[], Encoder[Any]],
        window: int,
        made_max: int,
        threads: anyio.CapacityLimiter,
        make_compressor: Callable[[], Compressor[Any]] | None = None,
        compressed_max: int = 0,
    ) -> None:
        self._source = source
        self._functions = functions
        self._make_encoder = make_encoder
        self.checkpoints = Checkpoints(())
        self._window = window
        self._made_max = made_max
        self._threads = threads
        self._make_compressor = make_compressor
        self._compressed_max = compressed_max

    def forget(self, below: int) -> None:
        """No byte below this image offset will be asked for again."""
        self.checkpoints.forget(below)

    async def pieces(self, start: int, end: int) -> AsyncIterator[Piece]:
        """The image bytes [start, end), in order; the receiver owns each piece and releases it before the next."""
        if start >= end:
            return
        checkpoint = self.checkpoints.at(start)
        memory = Memory(Ledger(2 * self._made_max), Pool(self._window, 2), self._made_max)
        position = start
        try:
            async with aclosing(self._made(checkpoint, memory)) as made:
                async for piece in made:
                    cut = _cut(piece, start, end)
                    if cut is None:
                        continue
                    if cut.offset != position:
                        cut.release()
                        raise StageError("the replayed image bytes have a gap", position=position, next=cut.offset)
                    position = cut.end
                    yield cut
                    if position >= end:
                        return
            raise StageError("the replay ended before the image bytes asked for", position=position, end=end)
        finally:
            memory.pool.close()

    async def _made(self, checkpoint: Checkpoint, memory: Memory) -> AsyncGenerator[Piece, None]:
        """All image bytes from the checkpoint on."""
        encoder = self._make_encoder()
        encoder.restore(checkpoint.mark.state)
        async with aclosing(self._encoded(encoder, checkpoint.mark.guest_offset, memory)) as encoded:
            if self._make_compressor is None or checkpoint.state is None:
                async for piece in encoded:
                    yield piece
                return
            compressor = self._make_compressor()
            compressor.restore(checkpoint.state)
            async with aclosing(self._compressed(compressor, encoded, checkpoint.window_offset)) as compressed:
                async for piece in compressed:
                    yield piece

    async def _compressed(
        self, compressor: Compressor[Any], encoded: AsyncIterator[Piece], start: int
    ) -> AsyncGenerator[Piece, None]:
        from pipeline.flow.compressing import Gatherer

        async def behind_start() -> AsyncIterator[Piece]:
            async for piece in encoded:
                cut = _cut(piece, start, 1 << 63)
                if cut is not None:
                    yield cut

        gatherer = Gatherer(
            window=self._window,
            ledger=Ledger(2 * self._compressed_max),
            made_max=self._compressed_max,
            start=start,
            buffers_held=1,  # of two: the other is what is read into
        )
        async for gathered in gatherer.windows(behind_start()):
            window, charge = gathered.window, gathered.charge
            if window.is_zero:
                prepared = compressor.prepare(window, charge)
            else:
                prepared = await in_thread(self._threads, partial(compressor.prepare, window, charge))
            for piece in compressor.place(prepared):
                yield piece
        for piece in compressor.finish():
            yield piece

    async def _encoded(self, encoder: Encoder[Any], guest_offset: int, memory: Memory) -> AsyncGenerator[Piece, None]:
        async for block in self._source.windows(self._window, guest_offset):
            for piece in await self._encode(encoder, block, memory):
                yield piece
        for piece in encoder.finish():
            yield piece

    async def _encode(self, encoder: Encoder[Any], block: Block, memory: Memory) -> Iterable[Piece]:
        loads = any(run.is_data for run in block.runs)
        charge = await memory.ledger.charge(memory.made_max) if loads and memory.made_max else None
        lease = await memory.pool.lease() if loads else None

        load = await loader_of(self._source)(block) if loads else None

        def process() -> tuple[Any, list[Any]]:
            seen, made = block, charge
            if lease is not None and load is not None:
                load(lease.buffer)
                seen = Block(block.offset, block.length, lease.into_slice(block.length), block.runs)
            notes = []
            for function in self._functions:
                seen, note = function.apply(seen)
                notes.append(note)
            if made is not None and seen.data is None:
                made.release()
                made = None
            return encoder.prepare(seen, made), notes

        prepared, notes = await in_thread(self._threads, process) if loads else process()
        for function, note in zip(self._functions, notes, strict=True):
            function.confirm(note, block.offset)
        return encoder.place(prepared)


def _cut(piece: Piece, start: int, end: int) -> Piece | None:
    """The part of a piece inside [start, end); takes the piece over."""
    low, high = max(piece.offset, start), min(piece.end, end)
    if low >= high:
        piece.release()
        return None
    if (low, high) == (piece.offset, piece.end):
        return piece
    if piece.data is None:
        return Piece(low, high - low, None, 0)
    if isinstance(piece.data, bytes):
        return Piece(low, high - low, piece.data[low - piece.offset : high - piece.offset], 0)
    shared = piece.data.share(low - piece.offset, high - piece.offset)
    piece.release()
    return Piece(low, high - low, shared, 0)
