"""Unpack one compressed cluster, never to more than its size.

Source: QEMU docs/interop/qcow2, "Compressed Clusters Descriptor" and "compression_type"; RFC 1951 (deflate);
RFC 8878, sections 3.1.1 and 3.1.2 (zstd frames).
"""

from __future__ import annotations

import threading
import zlib
from typing import TYPE_CHECKING, cast

from pipeline.units import KiB, MiB

if TYPE_CHECKING:
    import zstandard

# RFC 8878 asks every decoder for 8 MiB; a frame that wants a larger window would cost each thread that much memory.
WINDOW_MAX = 8 * MiB
# Writers make one frame a cluster. More are legal, but thousands of empty ones are an attack on our time.
FRAMES_MAX = 64
# Output per call when the 4 KiB window is checked exactly: distances are seen up to this much too long.
_STEP = 256
_STEP_INPUT = 4 * KiB  # what zlib leaves of it is copied in each step

# One stream in so many is inflated in steps whatever it begins with. Fewer would find a bad compressor later, more cost
# time: at 64 it is 5 %.
_CAREFUL_EVERY = 64

_BLOCK_WITH_ITS_CODE = 0b10
_ZSTD_CHECKSUM_BYTES = 4
_ZSTD_RLE_BLOCK = 1
_SKIPPABLE_MAGIC = 0x184D2A50

_of_thread = threading.local()


class Unpackable(Exception):
    """The cluster can't be unpacked; the text says why."""


def inflate(packed: memoryview, size: int, *, strict: bool) -> bytes:
    """Unpack one deflate stream that must give exactly `size` bytes; what follows the stream is ignored.

    Args:
        strict: the stream must do with a window of 4 KiB, which is what other readers of qcow2 keep.
    Raises:
        Unpackable: damaged, too short, or too long. Never makes more than `size + 1` bytes.
    Threads: any; lets other threads run meanwhile.
    """
    from isal import isal_zlib

    damage = cast("type[Exception]", isal_zlib.error)  # its stub says that this is an instance
    # ISA-L checks distances in blocks with a code of their own but not in those with the fixed code, and zlib only
    # against what it made in earlier calls. So streams that begin otherwise (short or odd data) are inflated in small
    # steps. A fixed block later in a stream is only found by inflating all of it like that, at a fifth of the speed:
    # one stream in `_CAREFUL_EVERY` is, as a compressor that keeps a larger window does so all over an image.
    if strict and packed.nbytes and (packed[0] >> 1 & 0b11 != _BLOCK_WITH_ITS_CODE or _is_picked(packed)):
        return _inflate_in_steps(packed, size)
    stream = isal_zlib.decompressobj(wbits=-12 if strict else -15)
    try:
        data: bytes = stream.decompress(packed, size + 1)
    except damage as error:
        raise Unpackable(f"its deflate stream is damaged or wants a window that is too large: {error}") from None
    return _exactly(data, size, ended=stream.eof)


def _is_picked(packed: memoryview) -> bool:
    """Whether this stream is looked at with care: always the same ones, all over an image."""
    return zlib.crc32(packed[:64]) % _CAREFUL_EVERY == 0


def _inflate_in_steps(packed: memoryview, size: int) -> bytes:
    stream = zlib.decompressobj(wbits=-12)
    made = bytearray()
    try:
        for start in range(0, packed.nbytes, _STEP_INPUT):
            rest: bytes | memoryview = packed[start : start + _STEP_INPUT]
            while len(made) <= size and not stream.eof:
                step = stream.decompress(rest, _STEP)
                rest = stream.unconsumed_tail
                made += step
                if not rest and len(step) < _STEP:
                    break
    except zlib.error as error:
        raise Unpackable(f"its deflate stream is damaged or wants a window that is too large: {error}") from None
    return _exactly(bytes(made), size, ended=stream.eof)


def expand_zstd(packed: memoryview, size: int) -> bytes:
    """Unpack zstd frames that together must give exactly `size` bytes; what follows the last one is ignored.

    Raises:
        Unpackable: damaged, too short, or too long. Never makes more than `size` bytes.
    Threads: any; lets other threads run meanwhile.
    """
    import zstandard

    made: list[bytes] = []
    missing = size
    for _ in range(FRAMES_MAX):
        try:
            if int.from_bytes(packed[:4], "little") & 0xFFFFFFF0 == _SKIPPABLE_MAGIC:
                packed = packed[8 + int.from_bytes(packed[4:8], "little") :]
                continue
            frame = zstandard.get_frame_parameters(packed)
            if frame.content_size not in (zstandard.CONTENTSIZE_UNKNOWN, 0) and frame.content_size > missing:
                raise Unpackable(f"it unpacks to more than {size} bytes")
            data = _zstd().decompress(packed, max_output_size=missing, allow_extra_data=True)
            missing -= len(data)
            if not missing:
                return b"".join((*made, data)) if made else data
            made.append(data)
            packed = packed[_zstd_frame_length(packed, has_checksum=frame.has_checksum) :]
        except zstandard.ZstdError as error:
            raise Unpackable(f"its zstd frame is damaged or unpacks to more than {size} bytes: {error}") from None
    raise Unpackable(f"{FRAMES_MAX} zstd frames do not fill it")


def _zstd() -> zstandard.ZstdDecompressor:
    import zstandard

    # One for each thread: the object must not be used by two at once.
    if not hasattr(_of_thread, "zstd"):
        _of_thread.zstd = zstandard.ZstdDecompressor(max_window_size=WINDOW_MAX)
    made: zstandard.ZstdDecompressor = _of_thread.zstd
    return made


def _zstd_frame_length(packed: memoryview, *, has_checksum: bool) -> int:
    """How long the first frame is; it was unpacked without a fault before."""
    import zstandard

    position = zstandard.frame_header_size(packed)
    is_last = False
    while not is_last and position < packed.nbytes:
        block = int.from_bytes(packed[position : position + 3], "little")
        is_last = bool(block & 1)
        position += 3 + (1 if block >> 1 & 0b11 == _ZSTD_RLE_BLOCK else block >> 3)
    return position + (_ZSTD_CHECKSUM_BYTES if has_checksum else 0)


def _exactly(data: bytes, size: int, *, ended: bool) -> bytes:
    if len(data) > size:
        raise Unpackable(f"it unpacks to more than {size} bytes")
    if len(data) < size or not ended:
        raise Unpackable(f"its deflate stream ends early, after {len(data)} of {size} bytes")
    return data
