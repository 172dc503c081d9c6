"""Store pieces in what takes writes at any offset: the one driver for files, SFTP, NBD and block devices.

Pieces that lie well are written from the buffers they were read into; the rest is packed into staging buffers first.
Zeros that nobody wrote are holes. A target that takes bytes in order only gets every one of them, zeros too. Pieces of
a later generation replace what was written before; they are written when all of that has come to rest.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import anyio
import anyio.abc

from pipeline.errors import StageError, first_error
from pipeline.events import UploadOpened
from pipeline.flow.buffers import Pool
from pipeline.flow.channels import Inlet
from pipeline.flow.items import Piece
from pipeline.flow.pacing import RateLimit
from pipeline.flow.stage import StageContext, UploadJournal
from pipeline.units import KiB
from stages.write.packing import Batch, Packer, is_aligned
from stages.write.shapes import RangeUpload

# How often it is noted how far the file is durable, unless that takes long: then seldom enough to cost a hundredth.
_MARK_EVERY_S = 1.0
_MARK_SHARE = 100
# Zeros shorter than this inside a packed stream are written, longer ones are left out of the file.
_HOLE_MIN = 64 * KiB


class RangeDriver:
    """Drives one upload from the first piece to the sealed file, or to its abort. Used once."""

    def __init__(
        self,
        upload: RangeUpload,
        context: StageContext,
        *,
        staging: Pool,
        in_flight: int,
        limit: RateLimit,
        journal: UploadJournal | None = None,
        make_durable: Callable[[], Awaitable[bool]] | None = None,
        clear: Callable[[int, int], Awaitable[None]] | None = None,
    ) -> None:
        """Prepare it; nothing is written before `store`.

        Args:
            staging: where pieces are packed; borrowed. Has at least two buffers.
            in_flight: batches being written at once.
            journal: notes how far the file is durable; says where the first piece comes.
            make_durable: brings what was written to stable storage, or says False where the target can't: then
                nothing is noted, and nothing can be gone on with. Wanted with a journal.
            clear: makes `length` bytes at an image offset zero, where what is never written is not zero already.
        """
        self._upload = upload
        self._context = context
        self._packer = Packer(staging)
        self._batch = Batch()
        self._in_flight = in_flight
        self._limit = limit
        self._room = anyio.Semaphore(in_flight)
        self._journal = journal
        self._make_durable = make_durable
        self._clear = clear
        self._size = self._position = journal.start.position if journal is not None else 0
        self._guest_bytes = journal.start.guest_bytes if journal is not None else 0
        self._head_length = context.layout.head_length if context.layout is not None else 0
        self._is_ascending = True  # apart from a head that comes last
        self._generation = 0
        self._writing: dict[int, int] = {}  # image offset of each batch under way

    async def store(self, inlet: Inlet[Piece]) -> int:
        """Take every piece, write and seal; returns the image's size in bytes.

        Raises:
            StageError: pieces or guest bytes are missing; nothing was committed.
            StoreError: the target failed for good.
            LeftBehindError: it failed, and removing what was written failed too.
        Cancellation: what was written is removed, or kept where the journal says so.
        """
        self._context.meter.parallelism = self._in_flight
        try:
            await self._upload.create()
            self._context.emit(UploadOpened(stage=self._context.name, uri=self._upload.partial_uri))
            if self._upload.in_order:
                self._room = anyio.Semaphore(1)
            try:
                async with self._marking(), anyio.create_task_group() as tasks:
                    async for piece in inlet:
                        if piece.generation > self._generation:
                            await self._come_to_rest(tasks)
                            self._generation = piece.generation
                        is_ascending = piece.offset >= self._position or piece.end <= self._head_length
                        self._is_ascending = self._is_ascending and is_ascending
                        self._size = max(self._size, piece.end)
                        self._guest_bytes += piece.guest_bytes
                        end = piece.end
                        await (self._follow(piece, tasks) if self._upload.in_order else self._take(piece, tasks))
                        self._position = max(self._position, end)
                    await self._write(self._batch, tasks)
                    await self._write(self._packer.take(), tasks)
            except BaseExceptionGroup as group:
                raise first_error(group) from group
            if self._guest_bytes != self._context.disk_size:
                raise StageError(
                    f"{self._guest_bytes} of {self._context.disk_size} guest bytes were written; nothing was committed",
                    operation="seal",
                )
            with self._context.meter.working():
                await self._upload.seal(self._size)
            if self._journal is not None:
                self._journal.note_mark(self._size)
        except BaseException as error:
            if self._journal is None or not self._journal.keeps(error):
                await self._upload.abort(error)
            raise
        return self._size

    @asynccontextmanager
    async def _marking(self) -> AsyncIterator[None]:
        """While inside, note now and then how far the file is durable."""
        if self._journal is None or self._make_durable is None:
            yield
            return
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._mark, self._journal, self._make_durable)
            yield
            tasks.cancel_scope.cancel()

    async def _mark(self, journal: UploadJournal, make_durable: Callable[[], Awaitable[bool]]) -> None:
        clock = self._context.clock
        pause = _MARK_EVERY_S
        while self._is_ascending:
            await clock.sleep(pause)
            reached, begun = self._settled(), clock.now()
            if reached > journal.mark:
                if not await make_durable():
                    return
                journal.note_mark(reached)
            pause = max(_MARK_EVERY_S, _MARK_SHARE * (clock.now() - begun))

    def _settled(self) -> int:
        """Every image byte below, behind a head that comes last, was written; 0 while that head is under way."""
        if not self._is_ascending:
            return 0
        waiting = [*self._writing.values(), *(offset for offset, _ in self._batch.parts)]
        if self._packer.is_open:
            waiting.append(self._packer.offset)
        return min(waiting, default=self._position)

    async def _come_to_rest(self, tasks: anyio.abc.TaskGroup) -> None:
        """Nothing is under way when this returns: two writes of the same bytes could overtake each other.

        What a target still remembers for sending it again is over, too.
        """
        await self._write(self._batch, tasks)
        self._batch = Batch()
        await self._write(self._packer.take(), tasks)
        for _ in range(self._in_flight):
            await self._room.acquire()
        for _ in range(self._in_flight):
            self._room.release()
        if self._make_durable is not None:
            await self._make_durable()

    async def _take(self, piece: Piece, tasks: anyio.abc.TaskGroup) -> None:
        packer = self._packer
        is_long_zero = piece.data is None and piece.length >= _HOLE_MIN
        follows = packer.follows(piece.offset)
        if packer.is_open and (not follows or is_long_zero or (is_aligned(piece) and packer.at_unit)):
            await self._write(packer.take(), tasks)
            follows = False
        if piece.data is None and not follows and self._clear is not None:
            self._writing[id(piece)] = piece.offset
            await self._room.acquire()
            tasks.start_soon(self._clear_piece, piece, self._clear)
        elif piece.data is None and not follows and not piece.generation:
            self._context.progress.acknowledge(guest_bytes=piece.guest_bytes, image_bytes=0)
        elif follows or not is_aligned(piece):
            async for full in packer.add(piece):
                await self._write(full, tasks)
        else:
            # One window a batch: a batch must not hold buffers while it waits for more of them.
            if not self._batch.takes(piece):
                await self._write(self._batch, tasks)
                self._batch = Batch()
            self._batch.add(piece)

    async def _follow(self, piece: Piece, tasks: anyio.abc.TaskGroup) -> None:
        """In order and without a gap."""
        position = self._packer.position
        if piece.offset < position:
            raise StageError(
                "the target takes writes in order only, and this piece belongs before others",
                operation="write",
                offset=piece.offset,
                expected=position,
            )
        gap = Piece(position, piece.offset - position, None, 0)
        for one in (gap, piece) if gap.length else (piece,):
            async for full in self._packer.add(one):
                await self._write(full, tasks)

    async def _write(self, batch: Batch | None, tasks: anyio.abc.TaskGroup) -> None:
        if batch is not None and batch.parts:
            self._writing[id(batch)] = batch.parts[0][0]
            await self._room.acquire()
            tasks.start_soon(self._write_batch, batch)

    async def _clear_piece(self, piece: Piece, clear: Callable[[int, int], Awaitable[None]]) -> None:
        try:
            with self._context.meter.working():
                await clear(piece.offset, piece.length)
            del self._writing[id(piece)]
        finally:
            self._room.release()
        self._context.progress.acknowledge(guest_bytes=piece.guest_bytes, image_bytes=0)

    async def _write_batch(self, batch: Batch) -> None:
        try:
            await self._limit.wait(batch.length)
            with self._context.meter.working():
                await self._upload.write(batch.parts)
            del self._writing[id(batch)]
        finally:
            self._room.release()
        batch.release()
        self._context.progress.acknowledge(guest_bytes=batch.guest_bytes, image_bytes=batch.length)
