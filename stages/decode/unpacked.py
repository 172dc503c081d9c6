"""Read a packed stream as if it were the file inside: forward at full speed, backward from places that were kept.

Streams of gzip, zstd and lz4 have no table of contents. Reading on in ascending order unpacks everything once. A read
that goes back begins again at the last kept place before it: the begin of a member or frame, or for gzip a copy of the
inflater's state inside a long one. Both are kept while passing, a bounded number, evenly spread. So a reader that keeps
the order pays nothing, and one that does not pays up to one spacing (`_Places`) of unpacking for each jump in a gzip
stream, and up to a frame in the others.

Source: RFC 1952, section 2.2, and RFC 8878, section 3 (members and frames follow each other without a gap).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import anyio
import anyio.to_thread

from pipeline.errors import FormatError, PipelineError
from pipeline.flow.items import RangeReader
from pipeline.units import GiB, KiB, MiB
from stages.decode.refusal import corrupt, unsupported
from stages.decode.unpackers import UNPACKERS, Damage, Unpacker

GZIP_MAGIC = b"\x1f\x8b\x08"
# Packed bytes read at once: little for whoever only looks at the begin, more for whoever goes on, as each read is a
# round trip to a store.
_INPUT_FIRST = 256 * KiB
_INPUT = 2 * MiB
# Unpacked bytes made at once: a thread call is 0.1 to 0.2 ms.
_OUTPUT = MiB
# Unpacked bytes kept behind the reading place, for windows that several tasks ask for in slightly another order.
_KEPT = 8 * MiB
# Copies of an inflater's state (about 45 KiB each) and begins of members.
_STATES_MAX = 64
_SPACING = 16 * MiB
# Members that give nothing: thousands of them are an attack on our time.
_EMPTY_MEMBERS_MAX = 1024
# What may follow the last member: zeros that pad to a tape block.
_PADDING_MAX = 64 * KiB
_NOTHING = memoryview(b"")
# What a stream may unpack to, where that has to be found out by unpacking all of it: 1 MiB of zstd can be 32 GiB of
# zeros. A disk that is packed better than that is empty.
_RATIO_MAX = 1024
_UNPACKED_FREE = GiB // 2
# What may be unpacked again by going back, in sizes of the whole. An order that needs more would take hours.
_AGAIN_MAX = 8
_AGAIN_FREE = GiB
_TOOLS = {"gzip": "gzip", "zstd": "zstd", "lz4": "lz4"}


@dataclass(slots=True)
class _Cursor:
    """Where unpacking stands: `at` packed bytes are consumed, `made` unpacked ones exist; `rest` was read too early."""

    at: int
    made: int
    unpacker: Unpacker | None
    rest: memoryview = _NOTHING
    empty_members: int = 0

    def copy(self) -> _Cursor:
        """To continue from here later. What was read too early is read again."""
        unpacker = self.unpacker.copy() if self.unpacker is not None else None
        return _Cursor(self.at - len(self.rest), self.made, unpacker)


class _Places:
    """Cursors to continue from, ascending; when they are too many, every other one goes and the spacing doubles."""

    def __init__(self) -> None:
        self._kept = [_Cursor(0, 0, None)]
        self._spacing = _SPACING

    @property
    def wanted_from(self) -> int:
        """Where the next one is of use; unpacked bytes."""
        return self._kept[-1].made + self._spacing

    def offer(self, cursor: _Cursor) -> None:
        """Keep a copy, where it is far enough behind the last one and can be made."""
        if cursor.made < self.wanted_from:
            return
        kept = cursor.copy()
        if cursor.unpacker is not None and kept.unpacker is None:
            return
        self._kept.append(kept)
        if len(self._kept) > _STATES_MAX:
            del self._kept[1::2]
            self._spacing *= 2

    def before(self, offset: int) -> _Cursor:
        """The last one at or before the unpacked `offset`; to be copied."""
        return next(one for one in reversed(self._kept) if one.made <= offset)


class UnpackedStream:
    """The content of a packed stream as a RangeReader.

    `size` is not known from the stream. An archive inside tells it, and `Section` cuts it out; else `measure` finds it.
    Reads are served one after the other, in the order they were asked for.
    """

    def __init__(self, reader: RangeReader, format: str, codec: str = "gzip") -> None:
        self._reader = reader
        self._format = format
        self._codec = codec
        self._places = _Places()
        self._cursor = _Cursor(0, 0, None)
        self._recent: deque[tuple[int, bytes]] = deque()
        self._recent_bytes = 0
        self._lock = anyio.Lock()
        self._ahead: tuple[int, bytes] | None = None  # where it begins, and what was read there before it was needed
        self._input = _INPUT_FIRST
        self._is_measured = False
        self._again = 0
        # No more can come out of deflate: 1032 bytes for each one, at most (zlib technical details).
        self.size = reader.size * 1032

    async def measure(self) -> None:
        """Unpack all of it once, to find its size and places to begin from.

        Raises:
            FormatError: it is damaged, or unpacks to much more than a disk would.
            StoreError: it can't be read.
        """
        limit = self._reader.size * _RATIO_MAX + _UNPACKED_FREE
        async with self._lock:
            while await self._advance():
                if self._cursor.made > limit:
                    raise corrupt(
                        self._format,
                        f"{self._reader.size} bytes unpack to more than {limit}",
                        self._cursor.at,
                        hint=f"If you trust it, unpack it first ({_TOOLS[self._codec]} -d).",
                    )
            self.size = self._cursor.made
            self._is_measured = True

    async def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` unpacked bytes.

        Raises:
            FormatError: the stream is damaged, its checksum is wrong, or it ends before.
            StoreError: it can't be read.
        Cancellation: waits for the unpacking that is under way.
        """
        if offset < 0 or length < 0:
            raise ValueError(f"no range: {offset}, {length}")
        if self._is_measured and offset + length > self.size:
            raise corrupt(self._format, f"the image inside ends after {self.size} bytes", None)
        async with self._lock:
            made = bytearray()
            while len(made) < length:
                position = offset + len(made)
                found = self._remembered(position, length - len(made))
                if found:
                    made += found
                    continue
                self._turn_to(position)
                if not await self._advance():
                    raise corrupt(self._format, f"the stream ends after {self._cursor.made} bytes", self._cursor.at)
            return bytes(made)

    async def check_end(self, offset: int, *, padding: int) -> None:
        """Unpack from `offset` to the end, so that the last checksum is compared too.

        Raises:
            FormatError: damage, or more than `padding` bytes that are not zero follow.
        """
        async with self._lock:
            if not self._remembered(offset, 1):
                self._turn_to(offset)
            while self._cursor.made <= offset + padding:
                if not await self._advance():
                    return
            raise corrupt(self._format, "more follows than an archive's padding", self._cursor.at)

    def _remembered(self, offset: int, length: int) -> bytes:
        for start, data in reversed(self._recent):
            if start <= offset < start + len(data):
                return data[offset - start : offset - start + length]
        return b""

    def _turn_to(self, position: int) -> None:
        """Go back, or forward over what was unpacked before, to the place nearest to `position`."""
        place = self._places.before(position)
        if place.made <= self._cursor.made <= position:
            return
        if self._is_measured and position < self._cursor.made:
            self._again += self._cursor.made - place.made
            if self._again > _AGAIN_FREE + _AGAIN_MAX * self.size:
                raise unsupported(
                    self._format,
                    f"an order that would unpack its {self._codec} stream many times over",
                    None,
                    hint=f"Unpack it into a file first ({_TOOLS[self._codec]} -d).",
                )
        self._cursor = place.copy()
        self._recent.clear()
        self._recent_bytes = 0

    async def _advance(self) -> bool:
        """Unpack the next bytes and remember them; False at the end of the stream."""
        cursor = self._cursor
        while True:
            if not cursor.rest and cursor.at < self._reader.size:
                cursor.rest = memoryview(await self._take(cursor.at))
                cursor.at += len(cursor.rest)
            if not cursor.rest and cursor.unpacker is None:
                return False
            start = cursor.made
            data = await self._unpack_and_read_on(cursor)
            if data:
                self._places.offer(cursor)
                self._recent.append((start, data))
                self._recent_bytes += len(data)
                while self._recent_bytes - len(self._recent[0][1]) >= _KEPT:
                    self._recent_bytes -= len(self._recent.popleft()[1])
                return True
            if not cursor.rest and cursor.at >= self._reader.size:
                if cursor.unpacker is not None:
                    raise corrupt(self._format, f"the {self._codec} stream is cut short", cursor.at)
                return False

    async def _take(self, at: int) -> bytes:
        """The packed bytes from there on, as many as are read at once."""
        if self._ahead is not None and self._ahead[0] == at:
            taken, self._ahead = self._ahead[1], None
            return taken
        length = min(self._input, self._reader.size - at)
        self._input = min(2 * self._input, _INPUT)
        return await self._reader.read(at, length)

    async def _unpack_and_read_on(self, cursor: _Cursor) -> bytes:
        """Unpack, and meanwhile read what comes next, but not before the reader has shown that it goes on."""
        is_begin = cursor.at <= _INPUT_FIRST
        is_ahead = self._ahead is not None and self._ahead[0] == cursor.at
        if is_begin or is_ahead or cursor.at >= self._reader.size:
            return await anyio.to_thread.run_sync(self._unpack, cursor)
        failed: FormatError | None = None
        data = b""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._read_on, cursor.at)
            try:
                data = await anyio.to_thread.run_sync(self._unpack, cursor)
            except FormatError as error:
                failed = error
                tasks.cancel_scope.cancel()
        if failed is not None:
            raise failed
        return data

    async def _read_on(self, at: int) -> None:
        try:
            self._ahead = (at, await self._take(at))
        except PipelineError:
            self._ahead = None  # whoever needs it reads it again, and is told

    def _unpack(self, cursor: _Cursor) -> bytes:
        """About `_OUTPUT` bytes from what was read. Runs in a worker thread."""
        made: list[bytes] = []
        room = _OUTPUT
        while cursor.rest and room > 0:
            if cursor.unpacker is None:
                if self._is_padding(cursor):
                    break
                cursor.unpacker = UNPACKERS[self._codec]()
            try:
                data, used = cursor.unpacker.unpack(cursor.rest, room)
            except Damage as error:
                at = cursor.at - len(cursor.rest)
                raise corrupt(self._format, f"the {self._codec} stream is damaged: {error}", at) from None
            cursor.rest = cursor.rest[used:]
            made.append(data)
            room -= len(data)
            cursor.made += len(data)
            cursor.empty_members = 0 if data else cursor.empty_members
            if cursor.unpacker.eof:
                cursor.unpacker = None
                cursor.empty_members += 1
                if cursor.empty_members > _EMPTY_MEMBERS_MAX:
                    raise corrupt(self._format, f"the {self._codec} stream consists of empty members", cursor.at)
                if cursor.made >= self._places.wanted_from:
                    break  # some unpackers can't be copied anywhere else
        return b"".join(made)

    def _is_padding(self, cursor: _Cursor) -> bool:
        """Pass over the zeros behind the last member."""
        if cursor.rest[0]:
            return False
        left = self._reader.size - cursor.at
        if any(cursor.rest) or left + len(cursor.rest) > _PADDING_MAX:
            raise corrupt(self._format, f"something follows the {self._codec} stream", cursor.at - len(cursor.rest))
        cursor.rest = _NOTHING
        return True
