"""Between encoder and writer: pieces of an image gathered into windows, compressed in threads, placed in order."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import anyio

from pipeline.errors import StageError
from pipeline.flow.buffers import Charge, Ledger, Slice
from pipeline.flow.channels import Inlet, Outlet
from pipeline.flow.items import ImageWindow, Piece
from pipeline.flow.meter import StageMeter
from pipeline.flow.parallel import in_thread, ordered_map
from pipeline.flow.replay import Checkpoints, Mark, Marks
from pipeline.flow.stage import Compressor, Inner, Start

# A window may keep this many buffers of the pool from being read into again: its own, and the one in which the window
# before it ends. A sparse image gets a window's bytes from many buffers, and they would all be held at once: then its
# bytes are copied as they come. One more costs a buffer for each thread, one less copies where pieces straddle.
_BUFFERS_HELD = 2
# Windows of zeros that travel as one item.
_ZEROS_AT_ONCE = 64


@dataclass(slots=True)
class Gathered:
    """A window on its way to a thread. Owns its slices and the charge, which only a window with data has.

    Attributes:
        mark: the encoder's state from which the window's first byte can be made again.
    """

    window: ImageWindow
    charge: Charge | None = None
    mark: Mark | None = None


class Gatherer:
    """Cuts pieces in sequence into windows of one length, the last one shorter.

    Args:
        window: image bytes.
        ledger, made_max: charged before a window takes its first data, so that windows get their memory in order.
        start: image offset of the first window.
        first: image offset of the first piece, at or before that; what lies before the first window is dropped.
        loose: guest bytes that the first window accounts for besides its pieces; less than 0 where pieces before it
            bring more than is missing.
        mark_at: asked at the begin of every window, on the event loop.
        buffers_held: how many buffers of the pool a window may keep before it copies.
    """

    def __init__(
        self,
        *,
        window: int,
        ledger: Ledger,
        made_max: int,
        start: int = 0,
        first: int | None = None,
        loose: int = 0,
        mark_at: Callable[[int], Mark | None] = lambda offset: None,
        meter: StageMeter | None = None,
        buffers_held: int = _BUFFERS_HELD,
    ) -> None:
        self._buffers_held = buffers_held
        self._window = window
        self._ledger = ledger
        self._made_max = made_max
        self._mark_at = mark_at
        self._meter = meter or StageMeter("")
        self.position = start if first is None else first
        self._start = start
        self._loose = loose
        self._open: Gathered | None = None
        self._buffers: list[Slice] = []
        self._copy: bytearray | None = None

    async def windows(self, pieces: AsyncIterator[Piece]) -> AsyncIterator[Gathered]:
        """The windows, in order.

        Raises:
            StageError: a piece does not follow the one before it.
        """
        loose = self._loose
        async for piece in pieces:
            if piece.offset != self.position:
                piece.release()
                raise StageError(
                    "a piece came out of order", operation="compress", offset=piece.offset, expected=self.position
                )
            done = counted = 0
            if piece.offset < self._start:
                done = min(piece.length, self._start - piece.offset)
                counted = piece.guest_bytes * done // piece.length if piece.length else 0
                loose += counted
                self.position += done
            if not piece.length:
                loose += piece.guest_bytes
            while done < piece.length:
                if not self._open and piece.data is None and piece.length - done >= self._window:
                    whole = min((piece.length - done) // self._window, _ZEROS_AT_ONCE) * self._window
                    opened = self._begin()
                    opened.window.length = whole
                else:
                    opened = self._open = self._open or self._begin()
                    whole = min(self._window - opened.window.length, piece.length - done)
                    await self._add(opened, piece, done, whole)
                done += whole
                self.position += whole
                # What a piece accounts for is spread over its windows, so that a hole of terabytes counts as it goes.
                share = piece.guest_bytes * done // piece.length
                opened.window.guest_bytes += share - counted + loose
                counted, loose = share, 0
                if opened.window.length >= self._window:
                    self._close()
                    yield opened
            piece.release()
        if self._open is not None:
            last = self._open
            self._close()
            yield last

    def _begin(self) -> Gathered:
        return Gathered(ImageWindow(self.position, 0, [], 0), mark=self._mark_at(self.position))

    def _close(self) -> None:
        self._open, self._copy = None, None
        self._buffers = []

    async def _add(self, opened: Gathered, piece: Piece, start: int, length: int) -> None:
        """Append [start, start + length) of the piece, which stays its owner's."""
        window = opened.window
        place = window.length
        window.length += length
        if piece.data is None:
            return
        if opened.charge is None:
            with self._meter.waiting("buffer"):
                opened.charge = await self._ledger.charge(self._made_max)
        data = piece.data
        if isinstance(data, Slice) and self._copy is None and not any(data.shares_with(one) for one in self._buffers):
            self._buffers.append(data)
            if len(self._buffers) > self._buffers_held:
                self._start_copying(window)
        if self._copy is not None:
            view = data.view if isinstance(data, Slice) else memoryview(data)
            self._copy[place : place + length] = view[start : start + length]
        elif isinstance(data, Slice):
            window.parts.append((place, data.share(start, start + length)))
        else:
            window.parts.append((place, data[start : start + length]))

    def _start_copying(self, window: ImageWindow) -> None:
        self._copy = bytearray(self._window)
        for start, data in window.parts:
            view = data.view if isinstance(data, Slice) else memoryview(data)
            self._copy[start : start + view.nbytes] = view
        window.release()
        window.parts.append((0, self._copy))
        self._buffers = []


@dataclass(slots=True)
class _Compressed:
    gathered: Gathered
    offset: int
    length: int
    guest_bytes: int
    prepared: Any
    spent_s: float


class CompressingSegment:
    """Runs a compressor over the windows of an image, in threads, in order.

    Args:
        ledger, made_max: memory of its own: pieces in, pieces out and the stages around can't starve each other.
        marks: the encoder's states, where bytes may have to be made again.
        start: where an earlier process of the export had come to.
        on_window: called on the loop before every window is placed, with its offset in the image before compressing,
            and how much of the disk the windows before it account for.
    """

    def __init__(
        self,
        compressor: Compressor[Any],
        *,
        window: int,
        ledger: Ledger,
        made_max: int,
        meter: StageMeter,
        threads: anyio.CapacityLimiter,
        workers: int,
        checkpoints: Checkpoints,
        marks: Marks,
        start: Start | None = None,
        on_window: Callable[[int, int], None] | None = None,
    ) -> None:
        self._compressor = compressor
        self._meter = meter
        self._threads = threads
        self._workers = workers
        self._checkpoints = checkpoints
        self._marks = marks
        start = start or Start()
        inner = start.inner or Inner()
        self._guest_bytes = start.guest_bytes
        self._on_window = on_window
        self._gatherer = Gatherer(
            window=window,
            ledger=ledger,
            made_max=made_max,
            start=inner.window_offset,
            first=inner.position,
            loose=inner.guest_bytes - start.guest_bytes,
            mark_at=marks.at,
            meter=meter,
        )

    async def run(self, inlet: Inlet[Piece], outlet: Outlet[Any]) -> None:
        """Take every piece, then finish. The engine ends the outlet."""

        async def place(done: _Compressed) -> None:
            await self._place(done, outlet)

        await ordered_map(self._gatherer.windows(aiter(inlet)), self._work, place, workers=self._workers)
        end = self._gatherer.position
        self._checkpoints.before_window(self._compressor, self._marks.at(end), end, reach=1 << 62)
        await self._send(self._compressor.finish(), outlet)

    async def _work(self, gathered: Gathered) -> _Compressed:
        if gathered.window.is_zero:
            return self._prepare(gathered)
        return await in_thread(self._threads, lambda: self._prepare(gathered))

    def _prepare(self, gathered: Gathered) -> _Compressed:
        """Threads: any."""
        window = gathered.window
        offset, length, guest_bytes = window.offset, window.length, window.guest_bytes
        before = time.perf_counter()
        prepared = self._compressor.prepare(window, gathered.charge)
        return _Compressed(gathered, offset, length, guest_bytes, prepared, time.perf_counter() - before)

    async def _place(self, done: _Compressed, outlet: Outlet[Any]) -> None:
        self._meter.working_s += done.spent_s
        self._meter.items += 1
        self._meter.guest_bytes += done.guest_bytes
        if self._on_window is not None:
            self._on_window(done.offset, self._guest_bytes)
        self._guest_bytes += done.guest_bytes
        self._checkpoints.before_window(self._compressor, done.gathered.mark, done.offset, reach=2 * done.length)
        await self._send(self._compressor.place(done.prepared), outlet)

    async def _send(self, placed: Any, outlet: Outlet[Any]) -> None:
        for piece in placed:
            self._checkpoints.placed(piece.end)
            await outlet.send(piece)
