"""Read a gzip stream as if it were the file inside: forward at full speed, backward from places that were kept.

A gzip stream has no table of contents. Reading on in ascending order inflates everything once. A read that goes back
begins again at the last kept place before it: the begin of a gzip member, or a copy of the inflater's state inside a
long one. Both are kept while passing, a bounded number, evenly spread. So a reader that keeps the order pays nothing,
and one that does not pays up to one spacing (`_Places`) of inflating for each jump over what was read already.

zlib-ng inflates here: as fast as ISA-L on gzip streams (4.6 against 3.9 GB/s on repetitive data, one core), and its
state can be copied, which ISA-L's can't.

Other codecs of whole streams (zstd, lz4) fit in as another `Unpacker`.

Source: RFC 1952, section 2.2 (members follow each other without a gap).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Protocol, cast

import anyio
import anyio.to_thread

from pipeline.flow.items import RangeReader
from pipeline.units import KiB, MiB
from stages.decode.refusal import corrupt

GZIP_MAGIC = b"\x1f\x8b\x08"
# Packed bytes read at once.
_INPUT = MiB
# Fed to the inflater at once: what it leaves is copied, each time it stops.
_STEP = 64 * KiB
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


class Unpacker(Protocol):
    """The state of unpacking one gzip member; as `zlib.decompressobj`."""

    eof: bool
    unused_data: bytes
    unconsumed_tail: bytes

    def decompress(self, data: memoryview, max_length: int) -> bytes: ...

    def copy(self) -> Unpacker: ...


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

    def offer(self, cursor: _Cursor) -> None:
        """Keep a copy, where it is far enough behind the last one."""
        if cursor.made < self._kept[-1].made + self._spacing:
            return
        self._kept.append(cursor.copy())
        if len(self._kept) > _STATES_MAX:
            del self._kept[1::2]
            self._spacing *= 2

    def before(self, offset: int) -> _Cursor:
        """A copy of the last one at or before the unpacked `offset`."""
        return next(one for one in reversed(self._kept) if one.made <= offset).copy()


class InflatedStream:
    """The content of a gzip stream as a RangeReader.

    `size` is not known from the stream; the archive inside tells it, and `Section` cuts it out. Reads
    are served one after the other, in the order they were asked for.
    """

    def __init__(self, reader: RangeReader, format: str) -> None:
        self._reader = reader
        self._format = format
        self._places = _Places()
        self._cursor = _Cursor(0, 0, None)
        self._recent: deque[tuple[int, bytes]] = deque()
        self._recent_bytes = 0
        self._lock = anyio.Lock()
        # No more can come out of deflate: 1032 bytes for each one, at most (zlib technical details).
        self.size = reader.size * 1032

    async def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` unpacked bytes.

        Raises:
            FormatError: the stream is damaged, its checksum is wrong, or it ends before.
            StoreError: it can't be read.
        Cancellation: waits for the unpacking that is under way.
        """
        if offset < 0 or length < 0:
            raise ValueError(f"no range: {offset}, {length}")
        async with self._lock:
            made = bytearray()
            while len(made) < length:
                position = offset + len(made)
                found = self._remembered(position, length - len(made))
                if found:
                    made += found
                    continue
                if position < self._cursor.made:
                    self._cursor = self._places.before(position)
                    self._forget()
                if not await self._advance():
                    raise corrupt(self._format, f"the stream ends after {self._cursor.made} bytes", self._cursor.at)
            return bytes(made)

    async def check_end(self, offset: int, *, padding: int) -> None:
        """Unpack from `offset` to the end, so that the last checksum is compared too.

        Raises:
            FormatError: damage, or more than `padding` bytes that are not zero follow.
        """
        async with self._lock:
            if offset < self._cursor.made and not self._remembered(offset, 1):
                self._cursor = self._places.before(offset)
                self._forget()
            while self._cursor.made <= offset + padding:
                if not await self._advance():
                    return
            raise corrupt(self._format, "more follows than an archive's padding", self._cursor.at)

    def _remembered(self, offset: int, length: int) -> bytes:
        for start, data in reversed(self._recent):
            if start <= offset < start + len(data):
                return data[offset - start : offset - start + length]
        return b""

    def _forget(self) -> None:
        self._recent.clear()
        self._recent_bytes = 0

    async def _advance(self) -> bool:
        """Unpack the next bytes and remember them; False at the end of the stream."""
        cursor = self._cursor
        while True:
            if not cursor.rest and cursor.at < self._reader.size:
                length = min(_INPUT, self._reader.size - cursor.at)
                cursor.rest = memoryview(await self._reader.read(cursor.at, length))
                cursor.at += length
            if not cursor.rest and cursor.unpacker is None:
                return False
            start = cursor.made
            data = await anyio.to_thread.run_sync(self._unpack, cursor)
            if data:
                self._places.offer(cursor)
                self._recent.append((start, data))
                self._recent_bytes += len(data)
                while self._recent_bytes - len(self._recent[0][1]) >= _KEPT:
                    self._recent_bytes -= len(self._recent.popleft()[1])
                return True
            if not cursor.rest and cursor.at >= self._reader.size:
                if cursor.unpacker is not None:
                    raise corrupt(self._format, "the gzip stream is cut short", cursor.at)
                return False

    def _unpack(self, cursor: _Cursor) -> bytes:
        """Up to `_OUTPUT` bytes from what was read. Runs in a worker thread."""
        from zlib_ng import zlib_ng

        damage = cast("type[Exception]", zlib_ng.error)
        made: list[bytes] = []
        room = _OUTPUT
        while cursor.rest and room:
            if cursor.unpacker is None:
                if self._is_padding(cursor):
                    break
                cursor.unpacker = cast(Unpacker, zlib_ng.decompressobj(31))
            unpacker = cursor.unpacker
            try:
                step = cursor.rest[:_STEP]
                data = unpacker.decompress(step, room)
            except damage as error:
                raise corrupt(
                    self._format, f"the gzip stream is damaged: {error}", cursor.at - len(cursor.rest)
                ) from None
            left = unpacker.unused_data if unpacker.eof else unpacker.unconsumed_tail
            cursor.rest = cursor.rest[step.nbytes - len(left) :]
            made.append(data)
            room -= len(data)
            cursor.made += len(data)
            cursor.empty_members = 0 if data else cursor.empty_members
            if unpacker.eof:
                cursor.unpacker = None
                cursor.empty_members += 1
                if cursor.empty_members > _EMPTY_MEMBERS_MAX:
                    raise corrupt(self._format, "the gzip stream consists of empty members", cursor.at)
        return b"".join(made)

    def _is_padding(self, cursor: _Cursor) -> bool:
        """Pass over the zeros behind the last member."""
        if cursor.rest[0]:
            return False
        left = self._reader.size - cursor.at
        if any(cursor.rest) or left + len(cursor.rest) > _PADDING_MAX:
            raise corrupt(self._format, "something follows the gzip stream", cursor.at - len(cursor.rest))
        cursor.rest = _NOTHING
        return True
