"""gzip members that hold nothing but zeros, made without compressing them."""

from __future__ import annotations

import functools
import struct
import zlib

from pipeline.units import MiB

# Zeros of one member. Twice of it halves the pieces of a huge hole (a thousandth of it each), and doubles their length.
MEMBER_MAX = 256 * MiB

_STEP = 1 * MiB
_HEADER = b"\x1f\x8b\x08\0\0\0\0\0\x02\xff"  # deflate, no name, no time, best compression, unknown system


@functools.lru_cache(8)
def zero_member(length: int) -> bytes:
    """A whole gzip member of `length` zeros, a thousandth of that long. Threads: any.

    Source: RFC 1952, "Member format"; RFC 1951: what stands before a full flush does not depend on what came before it,
    so the deflate blocks of one MiB can be repeated.
    """
    steps, rest = divmod(length, _STEP)
    end = zlib.compressobj(9, zlib.DEFLATED, -15)
    last = end.compress(bytes(rest)) + end.flush()
    trailer = struct.pack("<II", _zeros_crc(length), length & 0xFFFFFFFF)
    return _HEADER + _flushed_step() * steps + last + trailer


@functools.cache
def _flushed_step() -> bytes:
    stream = zlib.compressobj(9, zlib.DEFLATED, -15)
    return stream.compress(bytes(_STEP)) + stream.flush(zlib.Z_FULL_FLUSH)


def _zeros_crc(length: int) -> int:
    """CRC-32 of zeros, by doubling."""
    from awscrt import checksums

    if length <= _STEP:
        return zlib.crc32(bytes(length))
    half = length // 2
    crc: int = _zeros_crc(half)
    crc = checksums.combine_crc32(crc, crc, half)
    return checksums.combine_crc32(crc, zlib.crc32(b"\0"), 1) if length % 2 else crc
