"""A copy-on-write layer over a disk that is only read: what a guest writes goes into a file of its own.

The file holds written grains at their own offsets and, behind the disk's size rounded up to a grain, a footer that
says which grains those are. It is written by `flush`; a file without one, or with one of another disk, is refused.
"""

from __future__ import annotations

import errno
import os
import struct
import tempfile
import zlib
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path

import anyio
import anyio.to_thread

from pipeline.errors import PlanError, StoreError
from pipeline.units import KiB
from stages.decode.image import Extent
from stages.serve.disk import ServedDisk, Span

# What the first write to a place copies from below. Smaller ones copy less and need larger maps.
GRAIN = 64 * KiB
_FOOTER = struct.Struct(">8sQIII")
_MAGIC = b"PIPELAYR"


class Bits:
    """A set of grains."""

    def __init__(self, count: int) -> None:
        self.data = bytearray(-(-count // 8))

    def __contains__(self, index: int) -> bool:
        return bool(self.data[index >> 3] >> (index & 7) & 1)

    def set(self, start: int, stop: int, value: bool) -> None:
        """Put a stretch in, or out."""
        index = start
        while index < stop:
            if index & 7 == 0 and stop - index >= 8:
                count = (stop - index) // 8
                self.data[index >> 3 : (index >> 3) + count] = (b"\xff" if value else b"\0") * count
                index += 8 * count
                continue
            mask = 1 << (index & 7)
            self.data[index >> 3] = self.data[index >> 3] | mask if value else self.data[index >> 3] & ~mask
            index += 1


class Layer:
    """A disk that can be written, over one that can't. Owns its file; `close` it in the end."""

    can_write = True

    def __init__(self, below: ServedDisk, fd: int, path: Path | None, limit: int | None) -> None:
        """Take over an open file; see `open_layer`."""
        self._left = limit
        self._below = below
        self._fd = fd
        self._path = path
        self.size = below.size
        count = -(-self.size // GRAIN)
        self._ours = Bits(count)  # not to be looked for below
        self._zero = Bits(count)  # ours, and zero; the file has nothing there
        self._writing = anyio.Lock()
        self.written_bytes = 0

    async def read(self, offset: int, length: int) -> Sequence[Span]:
        """From the file what was written, from below what was not."""
        spans: list[Span] = []
        for start, stop, kind in self._stretches(offset, offset + length):
            if kind == "below":
                spans += await self._below.read(start, stop - start)
            elif kind == "zero":
                spans.append(Span(stop - start, None))
            else:
                spans.append(Span(stop - start, memoryview(await self._pread(start, stop - start))))
        return spans

    async def extents(self, offset: int, length: int) -> AsyncIterator[Extent]:
        """What was written and what lies below."""
        for start, stop, kind in self._stretches(offset, offset + length):
            if kind != "below":
                yield Extent(start, stop - start, is_zero=kind == "zero")
                continue
            async for extent in self._below.extents(start, stop - start):
                yield extent

    async def write(self, offset: int, data: memoryview) -> None:
        """Into the file; a grain that is touched first is copied from below."""
        async with self._writing:
            end = offset + data.nbytes
            first, last = offset // GRAIN, -(-end // GRAIN)
            self._take_room(first, last)
            head = await self._edge(first * GRAIN, offset)
            tail_end = min(last * GRAIN, self.size)
            tail = await self._edge(end, tail_end)
            await self._pwrite(first * GRAIN, b"".join((head, data, tail)) if head or tail else data)
            self._ours.set(first, last, True)
            self._zero.set(first, last, False)
            self.written_bytes += data.nbytes

    async def zero(self, offset: int, length: int) -> None:
        """Whole grains by name alone."""
        end = offset + length
        first, last = -(-offset // GRAIN), end // GRAIN
        if end == self.size:
            last = -(-end // GRAIN)
        if first >= last:
            await self.write(offset, memoryview(bytes(length)))
            return
        for start, stop in ((offset, first * GRAIN), (last * GRAIN, end)):
            if start < stop:
                await self.write(start, memoryview(bytes(stop - start)))
        async with self._writing:
            self._ours.set(first, last, True)
            self._zero.set(first, last, True)

    async def flush(self) -> None:
        """Data and map on stable storage, where the file is to stay."""
        if self._path is not None:
            async with self._writing:
                await anyio.to_thread.run_sync(self._save)

    def close(self) -> None:
        """Close the file; idempotent. `flush` first what is to stay."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1

    def load(self) -> None:
        """Take over what an earlier process wrote. Raises PlanError where the file is none of ours."""
        at = -(-self.size // GRAIN) * GRAIN
        head = os.pread(self._fd, _FOOTER.size, at)
        size = len(self._ours.data)
        body = os.pread(self._fd, 2 * size, at + _FOOTER.size)
        told = _FOOTER.unpack(head) if len(head) == _FOOTER.size else None
        if told is None or told != (_MAGIC, self.size, GRAIN, zlib.crc32(body), size) or len(body) != 2 * size:
            raise PlanError(
                "this file is no layer over this disk, or was not closed well",
                operation="open overlay",
                path=self._path,
                hint="Name a file that does not exist yet, or the one that was made with this image.",
            )
        self._ours.data[:], self._zero.data[:] = body[:size], body[size:]

    def _save(self) -> None:
        try:
            os.fdatasync(self._fd)
            body = bytes(self._ours.data + self._zero.data)
            head = _FOOTER.pack(_MAGIC, self.size, GRAIN, zlib.crc32(body), len(self._ours.data))
            _write_fully(self._fd, head + body, -(-self.size // GRAIN) * GRAIN)
            os.fdatasync(self._fd)
        except OSError as error:
            raise self._store_error(error) from None

    def _stretches(self, offset: int, end: int) -> Iterator[tuple[int, int, str]]:
        start, kind = offset, ""
        for grain in range(offset // GRAIN, -(-end // GRAIN)):
            now = "below" if grain not in self._ours else "zero" if grain in self._zero else "file"
            if kind and now != kind:
                yield start, grain * GRAIN, kind
                start = grain * GRAIN
            kind = now
        if start < end:
            yield start, end, kind

    def _take_room(self, first: int, last: int) -> None:
        """Raises StoreError where the file would become longer than it may."""
        if self._left is None:
            return
        fresh = sum(grain not in self._ours or grain in self._zero for grain in range(first, last)) * GRAIN
        if fresh > self._left:
            raise StoreError(
                "the overlay is as large as it may become", operation="overlay", status=errno.ENOSPC, left=self._left
            )
        self._left -= fresh

    async def _edge(self, start: int, stop: int) -> bytes:
        """What a grain holds beside the bytes that are written."""
        if start >= stop:
            return b""
        return b"".join(span.data or bytes(span.length) for span in await self.read(start, stop - start))

    async def _pread(self, offset: int, length: int) -> bytes:
        def pread() -> bytes:
            data = os.pread(self._fd, length, offset)
            return data + bytes(length - len(data))

        try:
            return await anyio.to_thread.run_sync(pread)
        except OSError as error:
            raise self._store_error(error) from None

    async def _pwrite(self, offset: int, data: bytes | memoryview) -> None:
        try:
            await anyio.to_thread.run_sync(_write_fully, self._fd, data, offset)
        except OSError as error:
            raise self._store_error(error) from None

    def _store_error(self, error: OSError) -> StoreError:
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        return StoreError(
            f"the overlay could not be written: {error.strerror}",
            operation="overlay",
            path=self._path or tempfile.gettempdir(),
            status=error.errno,
            hint="Free space there, or name another file with --overlay." if is_full else "",
        )


def open_layer(below: ServedDisk, path: Path | None, *, limit: int | None = None) -> Layer:
    """Open or make a layer's file.

    Args:
        path: None: a file without a name, gone when it is closed.
        limit: bytes that may be written into it, in whole grains; then the disk is full for its clients.
    Raises:
        PlanError: it is there and none of this disk, or can't be made.
    """
    try:
        if path is None:
            fd, name = tempfile.mkstemp(prefix="pipeline-overlay-")
            os.unlink(name)
            return Layer(below, fd, None, limit)
        is_new = not path.exists()
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT | os.O_EXCL if is_new else 0), 0o600)
    except OSError as error:
        raise PlanError(f"the overlay can't be opened: {error.strerror}", operation="open overlay", path=path) from None
    layer = Layer(below, fd, path, limit)
    try:
        if not is_new:
            layer.load()
    except BaseException:
        layer.close()
        raise
    return layer


def _write_fully(fd: int, data: bytes | memoryview, offset: int) -> None:
    view = memoryview(data)
    done = 0
    while done < view.nbytes:
        done += os.pwrite(fd, view[done:], offset + done)
