"""A stretch of neighbouring stages that runs as one thread call per window.

A thread round trip costs 0.1 to 0.2 ms and a call per cluster is four times slower than one per window, so source,
function stages and an encoder's `prepare` are fused. Without fusing each stage is a segment of its own, with a channel
between; the image is the same.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import anyio

from pipeline.errors import StageError
from pipeline.flow.buffers import Charge, Lease, Memory
from pipeline.flow.channels import Inlet, Outlet
from pipeline.flow.items import Block, Piece, tiles
from pipeline.flow.meter import StageMeter
from pipeline.flow.parallel import in_thread, ordered_map
from pipeline.flow.replay import Checkpoints, Marks
from pipeline.flow.stage import Encoder, FunctionStage, Load, Source, Start, loader_of


@dataclass(slots=True)
class _Job:
    """One window on its way to a thread; a skip has neither lease nor charge. `load` fills the leased buffer."""

    block: Block
    lease: Lease | None = None
    charge: Charge | None = None
    load: Load | None = None
    fetched_s: float = 0.0


@dataclass(slots=True)
class _Done:
    """What a thread made of one window. `spent_s` has one entry per stage of the segment."""

    block: Block
    notes: list[Any] = field(default_factory=list)
    prepared: Any = None
    spent_s: list[float] = field(default_factory=list)


class Segment:
    """Runs [source] + function stages + [encoder] over every window, in threads, in order.

    Args:
        source: loads the windows; without it they come from an inlet.
        functions: applied in this order.
        encoder: turns blocks into pieces; without it blocks go to the outlet.
        meters: one per stage, in the same order.
        observed: called on the loop with every block as it leaves the last function stage, in order.
        start: where the disk is read from; what lies before was placed by an earlier process.
        on_boundary: called on the loop before every block is observed and placed, with where a run that begins there
            begins, and at the end (True).
        before_finish: awaited with the outlet when every block was placed, before the stages finish.
    """

    def __init__(
        self,
        *,
        source: Source | None,
        functions: Sequence[FunctionStage[Any]],
        encoder: Encoder[Any] | None,
        meters: list[StageMeter],
        memory: Memory,
        disk_size: int,
        window: int,
        threads: anyio.CapacityLimiter,
        workers: int,
        observed: Callable[[Block], None] | None = None,
        checkpoints: Checkpoints | Marks | None = None,
        start: Start | None = None,
        on_boundary: Callable[[Start, bool], None] | None = None,
        before_finish: Callable[[Outlet[Any]], Awaitable[None]] | None = None,
    ) -> None:
        self._source = source
        self._make_load = loader_of(source) if source else None
        self._functions = functions
        self._encoder = encoder
        self._meters = meters
        self._memory = memory
        self._disk_size = disk_size
        self._start = start or Start()
        self._position = self._start.guest_offset  # behind the last block placed
        self._guest_bytes = self._start.guest_bytes  # that all pieces so far account for
        self._on_boundary = on_boundary
        self._before_finish = before_finish
        self._window = window
        self._threads = threads
        self._workers = workers
        self._observed = observed
        self._checkpoints = checkpoints

    async def run(self, inlet: Inlet[Block] | None, outlet: Outlet[Any]) -> None:
        """Take every block, then finish the stages in order. The engine ends the outlet."""
        if self._source:
            blocks = self._source.windows(self._window, self._start.guest_offset)
        else:
            assert inlet is not None, "a segment without a source has an inlet"
            blocks = aiter(inlet)

        async def place(done: _Done) -> None:
            await self._place(done, outlet)

        await ordered_map(self._admit(blocks), self._work, place, workers=self._workers)
        if self._position != self._disk_size:
            raise StageError(f"blocks covered {self._position} of {self._disk_size} guest bytes")
        self._tell_boundary(is_end=True)
        if self._before_finish:
            await self._before_finish(outlet)
        for function in self._functions:
            function.finish()
        if self._encoder:
            if self._checkpoints:
                self._checkpoints.before_end(self._encoder)
            await self._send(self._encoder.finish(), outlet)

    async def _admit(self, blocks: AsyncIterator[Block]) -> AsyncIterator[_Job]:
        """Give every window its memory before it enters a thread, in guest order: the next in turn always has it."""
        async for block in blocks:
            job = _Job(block)
            loads = self._source is not None and any(run.is_data for run in block.runs)
            if self._encoder and self._memory.made_max and (loads or block.data is not None):
                with self._meters[0].waiting("buffer"):
                    job.charge = await self._memory.ledger.charge(self._memory.made_max)
            if loads:
                with self._meters[0].waiting("buffer"):
                    job.lease = await self._memory.pool.lease()
            yield job

    async def _work(self, job: _Job) -> _Done:
        if job.lease is None and job.block.data is None:
            return self._process(job)
        if self._make_load and job.lease is not None:
            begun = time.perf_counter()
            job.load = await self._make_load(job.block)
            job.fetched_s = time.perf_counter() - begun
        return await in_thread(self._threads, lambda: self._process(job))

    def _process(self, job: _Job) -> _Done:
        """Load, look, prepare: one window through every stage. Threads: any."""
        done = _Done(job.block)
        block = job.block
        before = time.perf_counter()
        if self._source:
            if job.lease is not None and job.load is not None:
                job.load(job.lease.buffer)
                block = Block(block.offset, block.length, job.lease.into_slice(block.length), block.runs)
            before = _lap(done.spent_s, before)
            done.spent_s[0] += job.fetched_s
        for function in self._functions:
            block, note = function.apply(block)
            done.notes.append(note)
            before = _lap(done.spent_s, before)
        done.block = block
        if self._encoder:
            charge = job.charge
            if charge is not None and block.data is None:
                charge.release()
                charge = None
            done.prepared = self._encoder.prepare(block, charge)
            _lap(done.spent_s, before)
        return done

    async def _place(self, done: _Done, outlet: Outlet[Any]) -> None:
        if done.block.offset != self._position or not tiles(done.block.runs, done.block.offset, done.block.length):
            raise StageError("blocks do not tile the disk", expected=self._position, offset=done.block.offset)
        self._tell_boundary(is_end=False)
        self._position = done.block.end
        for meter, spent in zip(self._meters, done.spent_s, strict=True):
            meter.working_s += spent
            meter.items += 1
            meter.guest_bytes += done.block.length
        for function, note in zip(self._functions, done.notes, strict=True):
            function.observe(note)
        if self._observed:
            self._observed(done.block)
        if self._encoder is None:
            await outlet.send(done.block)
            return
        if self._checkpoints:
            self._checkpoints.before(self._encoder, done.block)
        await self._send(self._encoder.place(done.prepared), outlet)

    async def _send(self, placed: Iterable[Piece], outlet: Outlet[Any]) -> None:
        # One after the other: what an encoder makes on the way (tables) need not be in memory all at once.
        for piece in placed:
            self._guest_bytes += piece.guest_bytes
            if self._checkpoints:
                self._checkpoints.placed(piece.end)
            await outlet.send(piece)

    def _tell_boundary(self, *, is_end: bool) -> None:
        if self._on_boundary is not None and self._encoder is not None:
            here = Start(position=self._encoder.position, guest_offset=self._position, guest_bytes=self._guest_bytes)
            self._on_boundary(here, is_end)


def _lap(laps: list[float], since: float) -> float:
    """Append the seconds since `since`; returns now."""
    now = time.perf_counter()
    laps.append(now - since)
    return now
