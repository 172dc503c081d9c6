"""Making image bytes again: encoder checkpoints at the places a sink asked for, and the replay from them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import anyio

from pipeline.errors import StageError
from pipeline.flow.buffers import Ledger, Memory, Pool
from pipeline.flow.items import Block, Piece
from pipeline.flow.parallel import in_thread
from pipeline.flow.stage import Encoder, FunctionStage, Source
from pipeline.units import MiB

# How far behind the last byte one block's pieces can reach beyond twice its length: tables and padding. Larger only
# takes a few more checkpoints that are thrown away.
_TABLES_REACH = 8 * MiB


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An encoder's state before the block at `guest_offset`, when its next image byte was `position`."""

    position: int
    guest_offset: int
    state: bytes


class Checkpoints:
    """Keeps, for every boundary that the sink named, the last encoder state before it.

    A state is taken only when the next block may reach a boundary, and dropped when it did not, so the cost does not
    grow with the disk.
    """

    def __init__(self, boundaries: tuple[int, ...]) -> None:
        self._boundaries = boundaries
        self._next = 0
        self._candidate: Checkpoint | None = None
        self._kept: dict[int, Checkpoint] = {}
        self._guest_end = 0

    def before(self, encoder: Encoder[Any], block: Block) -> None:
        """Called before every block is placed."""
        self._guest_end = block.end
        self._take(encoder, block.offset, 2 * block.length + _TABLES_REACH)

    def before_end(self, encoder: Encoder[Any]) -> None:
        """Called before the encoder finishes."""
        self._take(encoder, self._guest_end, 1 << 62)

    def placed(self, position: int) -> None:
        """Called after; binds the state taken before to every boundary that was passed."""
        while self._next < len(self._boundaries) and self._boundaries[self._next] < position:
            if self._candidate is not None:
                self._kept[self._boundaries[self._next]] = self._candidate
            self._next += 1
        self._candidate = None

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
        if self._next < len(self._boundaries) and self._boundaries[self._next] < encoder.position + reach:
            self._candidate = Checkpoint(encoder.position, guest_offset, encoder.checkpoint())


class SourceReplay:
    """Reads and encodes a stretch of the image once more, one window after the other, with memory of its own.

    Args:
        make_encoder: a fresh encoder with the options and layout of the run.
        window, made_max: a replay uses two buffers and two charges of these sizes, beside those of the chain.
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
    ) -> None:
        self._source = source
        self._functions = functions
        self._make_encoder = make_encoder
        self.checkpoints = Checkpoints(())
        self._window = window
        self._made_max = made_max
        self._threads = threads

    def forget(self, below: int) -> None:
        """No byte below this image offset will be asked for again."""
        self.checkpoints.forget(below)

    async def pieces(self, start: int, end: int) -> AsyncIterator[Piece]:
        """The image bytes [start, end), in order; the receiver owns each piece and releases it before the next."""
        if start >= end:
            return
        mark = self.checkpoints.at(start)
        encoder = self._make_encoder()
        encoder.restore(mark.state)
        memory = Memory(Ledger(2 * self._made_max), Pool(self._window, 2), self._made_max)
        position = start
        try:
            async for piece in self._encoded(encoder, mark.guest_offset, memory):
                cut = _cut(piece, start, end)
                if cut is None:
                    continue
                if cut.offset != position:
                    raise StageError("the replayed image bytes have a gap", position=position, next=cut.offset)
                position = cut.end
                yield cut
                if position >= end:
                    return
            raise StageError("the replay ended before the image bytes asked for", position=position, end=end)
        finally:
            memory.pool.close()

    async def _encoded(self, encoder: Encoder[Any], guest_offset: int, memory: Memory) -> AsyncIterator[Piece]:
        async for block in self._source.windows(self._window, guest_offset):
            for piece in await self._encode(encoder, block, memory):
                yield piece
        for piece in encoder.finish():
            yield piece

    async def _encode(self, encoder: Encoder[Any], block: Block, memory: Memory) -> Iterable[Piece]:
        loads = any(run.is_data for run in block.runs)
        charge = await memory.ledger.charge(memory.made_max) if loads and memory.made_max else None
        lease = await memory.pool.lease() if loads else None

        def process() -> tuple[Any, list[Any]]:
            seen, made = block, charge
            if lease is not None:
                self._source.load(block, lease.buffer)
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
