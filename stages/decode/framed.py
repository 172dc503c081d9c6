"""Read a compressed image as if it were the image inside, from any place, frame by frame.

The frames' places come from the stream's own seek table (zstd) or from the manifest (lz4, gzip). They are not
believed: the lengths must add up to the stream, and every frame must unpack to exactly what the index says.

Source: Zstandard Seekable Format 0.1.0; LZ4 Frame Format Description; RFC 1952.
"""

from __future__ import annotations

import struct
from array import array
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterable
from itertools import accumulate
from typing import cast

import anyio
import anyio.to_thread

from pipeline.errors import FormatError
from pipeline.flow.items import RangeReader
from pipeline.units import MiB
from stages.compress.index import FrameIndex
from stages.decode.refusal import corrupt, unsupported

# What a frame may unpack to: ours are 2 or 4 MiB long, and it has to fit into memory a few times.
FRAME_MAX = 64 * MiB
# Unpacked frames kept for reads that share them: windows of an image that do not begin where frames do.
_KEPT = 4

_SKIPPABLE_MAGIC = 0x184D2A5E
_SEEKABLE_MAGIC = 0x8F92EAB1
_HEADER = struct.Struct("<II")
_FOOTER = struct.Struct("<IBI")
_CHECKSUMS = 0x80
_RESERVED = 0x7C
_FRAMES_MAX = 1 << 27
_LZ4_MAGIC = b"\x04\x22\x4d\x18"


class FramedReader:
    """The image inside a stream of frames, as a RangeReader. For many tasks at once.

    Args:
        reader: of the stream; borrowed.
        lengths, sizes: of each frame in the stream, and unpacked.
        end: where the frames end in the stream.
    """

    def __init__(
        self, reader: RangeReader, codec: str, lengths: Iterable[int], sizes: Iterable[int], *, end: int
    ) -> None:
        self._reader = reader
        self._codec = codec
        self._unpack = _UNPACKERS[codec]
        self._at = array("Q", accumulate(lengths, initial=0))
        self._from = array("Q", accumulate(sizes, initial=0))
        self.size = self._from[-1]
        if self._at[-1] != end:
            raise corrupt(codec, f"the frames take {self._at[-1]} bytes by their index, and the stream has {end}", None)
        self._kept: OrderedDict[int, bytes] = OrderedDict()
        self._locks: dict[int, anyio.Lock] = {}

    async def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes of the image inside.

        Raises:
            FormatError: a frame is damaged, or the range reaches beyond the end.
            StoreError: the stream can't be read.
        """
        if offset < 0 or length < 0:
            raise ValueError(f"no range: {offset}, {length}")
        if offset + length > self.size:
            raise corrupt(self._codec, f"the image inside ends at {self.size}", None)
        made = bytearray()
        number = bisect_right(self._from, offset) - 1
        while len(made) < length:
            frame = await self._frame(number)
            start = offset + len(made) - self._from[number]
            if not start and length - len(made) == len(frame) and not made:
                return frame
            made += memoryview(frame)[start : start + length - len(made)]
            number += 1
        return bytes(made)

    async def _frame(self, number: int) -> bytes:
        lock = self._locks.setdefault(number, anyio.Lock())
        try:
            async with lock:
                kept = self._kept.get(number)
                if kept is None:
                    start, stop = self._at[number], self._at[number + 1]
                    stored = await self._reader.read(start, stop - start)
                    size = self._from[number + 1] - self._from[number]
                    kept = await anyio.to_thread.run_sync(self._unpack, stored, size, start)
                    self._kept[number] = kept
                    while len(self._kept) > _KEPT:
                        self._kept.popitem(last=False)
                else:
                    self._kept.move_to_end(number)
                return kept
        finally:
            if not lock.statistics().tasks_waiting:
                self._locks.pop(number, None)


async def open_framed(reader: RangeReader, codec: str, index: FrameIndex | None) -> FramedReader:
    """Find the frames.

    Args:
        index: as the export recorded it; None: the stream's own, where it has one.
    Raises:
        FormatError: there is no index, or it does not fit the stream.
        StoreError: the stream can't be read.
    """
    if codec not in _UNPACKERS:
        raise FormatError(f"streams of the codec {codec} can't be read", operation="open")
    if codec == "zstd":
        return await _open_seekable(reader, index)
    if index is None:
        raise unsupported(
            codec,
            f"{codec} without an index of its frames",
            None,
            hint="The index is in the manifest. Verify it with its manifest, or unpack it first.",
        )
    if index.codec != codec or index.window > FRAME_MAX:
        raise corrupt(codec, f"its index is one of {index.codec} with windows of {index.window} bytes", None)
    return FramedReader(reader, codec, index.lengths, _sizes(index), end=reader.size)


def _sizes(index: FrameIndex) -> Iterable[int]:
    frames = len(index.lengths)
    return (min(index.window, index.size - number * index.window) for number in range(frames))


async def has_seek_table(reader: RangeReader) -> bool:
    """Whether a zstd stream says where its frames are. Raises StoreError."""
    if reader.size < _HEADER.size + _FOOTER.size:
        return False
    return int.from_bytes(await reader.read(reader.size - 4, 4), "little") == _SEEKABLE_MAGIC


async def _open_seekable(reader: RangeReader, index: FrameIndex | None) -> FramedReader:
    if reader.size < _HEADER.size + _FOOTER.size:
        raise corrupt("zstd", "the stream is too short for a seek table", 0)
    place = reader.size - _FOOTER.size
    frames, descriptor, magic = _FOOTER.unpack(await reader.read(place, _FOOTER.size))
    if magic != _SEEKABLE_MAGIC:
        raise corrupt("zstd", "the stream does not end in a seek table", place)
    if frames > _FRAMES_MAX or descriptor & _RESERVED:
        raise corrupt("zstd", f"its seek table has {frames} frames and the descriptor {descriptor:#x}", place)
    entry = 12 if descriptor & _CHECKSUMS else 8
    length = frames * entry
    end = place - length - _HEADER.size
    if end < 0:
        raise corrupt("zstd", "its seek table is longer than the stream", place)
    table = await reader.read(end, _HEADER.size + length)
    if _HEADER.unpack_from(table) != (_SKIPPABLE_MAGIC, length + _FOOTER.size):
        raise corrupt("zstd", "its seek table is not in a skippable frame of its length", end)
    lengths, sizes = array("I"), array("I")
    for stored, unpacked, *_ in struct.iter_unpack("<III" if entry == 12 else "<II", table[_HEADER.size :]):
        if not 0 < unpacked <= FRAME_MAX:
            raise corrupt("zstd", f"its seek table has a frame of {unpacked} bytes", end)
        lengths.append(stored)
        sizes.append(unpacked)
    if index is not None and (index.lengths != lengths or index.size != sum(sizes)):
        raise corrupt("zstd", "its seek table is not the recorded one", end)
    return FramedReader(reader, "zstd", lengths, sizes, end=end)


def _unpack_zstd(stored: bytes, size: int, at: int) -> bytes:
    import zstandard

    try:
        if zstandard.frame_content_size(stored) != size:
            raise corrupt("zstd", f"a frame does not hold {size} bytes", at)
        decompressor = zstandard.ZstdDecompressor(max_window_size=2 * FRAME_MAX)
        made = decompressor.decompress(stored, max_output_size=size, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise corrupt("zstd", f"a frame is damaged: {error}", at) from None
    return _checked("zstd", made, size, at)


def _unpack_lz4(stored: bytes, size: int, at: int) -> bytes:
    from lz4.frame import LZ4FrameDecompressor

    if stored[:4] != _LZ4_MAGIC:
        raise corrupt("lz4", "a frame does not begin where the index says", at)
    unpacker = LZ4FrameDecompressor()
    try:
        made = cast(bytes, unpacker.decompress(stored, size + 1))
        while len(made) <= size and not unpacker.eof and not unpacker.needs_input:
            more = cast(bytes, unpacker.decompress(b"", size + 1 - len(made)))
            if not more:
                break
            made += more
    except RuntimeError as error:
        raise corrupt("lz4", f"a frame is damaged: {error}", at) from None
    if not unpacker.eof or unpacker.unused_data:
        raise corrupt("lz4", "a frame does not end where the index says", at)
    return _checked("lz4", made, size, at)


def _unpack_gzip(stored: bytes, size: int, at: int) -> bytes:
    from zlib_ng import zlib_ng

    damage = cast("type[Exception]", zlib_ng.error)
    unpacker = zlib_ng.decompressobj(31)
    try:
        made: bytes = unpacker.decompress(stored, size + 1)
        if not unpacker.eof and len(made) <= size:  # the member's end, when all of its bytes came out before
            made += unpacker.decompress(unpacker.unconsumed_tail, size + 1 - len(made))
    except damage as error:
        raise corrupt("gzip", f"a member is damaged: {error}", at) from None
    if not unpacker.eof or unpacker.unused_data:
        raise corrupt("gzip", "a member does not end where the index says", at)
    return _checked("gzip", made, size, at)


def _checked(codec: str, made: bytes, size: int, at: int) -> bytes:
    if len(made) != size:
        raise corrupt(codec, f"a frame holds {len(made)} bytes instead of {size}", at)
    return made


_UNPACKERS: dict[str, Callable[[bytes, int, int], bytes]] = {
    "lz4": _unpack_lz4,
    "zstd": _unpack_zstd,
    "gzip": _unpack_gzip,
}
CODECS = tuple(_UNPACKERS)
