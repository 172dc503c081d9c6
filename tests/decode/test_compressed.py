"""Unpacking single clusters: exact size, 4 KiB window, many zstd frames."""

from __future__ import annotations

import random
import zlib

import pytest
import zstandard

from pipeline.units import KiB, MiB
from stages.decode.compressed import Unpackable, expand_zstd, inflate

NOISE = random.Random(7).randbytes(64 * KiB)
AFTER = random.Random(8).randbytes(600)  # the next cluster begins in the same sector


def deflated(data: bytes, *, bits: int = -12, strategy: int = zlib.Z_DEFAULT_STRATEGY) -> bytes:
    stream = zlib.compressobj(9, zlib.DEFLATED, bits, 9, strategy)
    return stream.compress(data) + stream.flush()


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("strategy", [zlib.Z_DEFAULT_STRATEGY, zlib.Z_FIXED, zlib.Z_HUFFMAN_ONLY])
@pytest.mark.parametrize("data", [NOISE, bytes(64 * KiB), b"ab" * 32768, NOISE[:4096] * 16])
def test_what_zlib_packs_comes_back(data: bytes, strategy: int, strict: bool) -> None:
    assert inflate(memoryview(deflated(data, strategy=strategy) + AFTER), len(data), strict=strict) == data


@pytest.mark.parametrize("level", [0, 1, 2, 3])
def test_what_isal_packs_is_strict(level: int) -> None:
    from isal import igzip_lib

    data = (NOISE[:5000] * 14)[: 64 * KiB]
    packed = igzip_lib.compress(data, level, igzip_lib.COMP_DEFLATE, igzip_lib.MEM_LEVEL_LARGE, 12)
    assert inflate(memoryview(packed + AFTER), len(data), strict=True) == data


@pytest.mark.parametrize("distance", [4400, 8192, 30000])
@pytest.mark.parametrize("strategy", [zlib.Z_DEFAULT_STRATEGY, zlib.Z_FIXED])
def test_strict_sees_a_window_that_other_readers_do_not_keep(distance: int, strategy: int) -> None:
    """A distance above 4096 passes qemu-img and still breaks readers that inflate with a window of 4 KiB."""
    letters = bytes(byte & 63 for byte in NOISE)  # compressible: noise would be stored
    data = letters[:distance] + letters[:300] + letters[distance : 64 * KiB - 300]
    packed = memoryview(deflated(data, bits=-15, strategy=strategy))
    assert inflate(packed, len(data), strict=False) == data
    with pytest.raises(Unpackable, match="window"):
        inflate(packed, len(data), strict=True)


def far_back_later(seed: int) -> tuple[bytes, bytes]:
    """A stream whose first block has a code of its own, and whose last, with the fixed code, reaches back too far."""
    draw = random.Random(seed)
    begin = bytes(byte & 63 for byte in draw.randbytes(16 * KiB))
    first = zlib.compressobj(9, zlib.DEFLATED, -12, 9)
    packed = first.compress(begin) + first.flush(zlib.Z_SYNC_FLUSH)
    end = begin[2 * KiB : 2 * KiB + 300].ljust(4 * KiB, b"x")
    last = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_FIXED, begin)
    return begin + end, packed + last.compress(end) + last.flush()


def test_strict_sees_a_window_too_large_in_a_later_block_of_some_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """And of all when it looks at all with care."""
    made = [far_back_later(seed) for seed in range(400)]
    refused = 0
    for data, packed in made:
        assert packed[0] >> 1 & 0b11 == 0b10
        try:
            assert inflate(memoryview(packed), len(data), strict=True) == data
        except Unpackable:
            refused += 1
    assert 0 < refused < 40
    monkeypatch.setattr("stages.decode.compressed._CAREFUL_EVERY", 1)
    for data, packed in made[:20]:
        assert inflate(memoryview(packed), len(data), strict=False) == data
        with pytest.raises(Unpackable, match="window"):
            inflate(memoryview(packed), len(data), strict=True)


@pytest.mark.parametrize("strict", [True, False])
def test_a_cut_deflate_stream_is_refused(strict: bool) -> None:
    for strategy in (zlib.Z_DEFAULT_STRATEGY, zlib.Z_FIXED):
        packed = deflated(b"some words " * 5000, strategy=strategy)
        for end in (0, 1, len(packed) // 2, len(packed) - 1):
            with pytest.raises(Unpackable):
                inflate(memoryview(packed)[:end], 55000, strict=strict)


def test_zstd_frames_of_every_kind_come_back() -> None:
    data = (NOISE[:3000] * 22)[: 64 * KiB]
    plain = zstandard.ZstdCompressor(level=1).compress
    unsized = zstandard.ZstdCompressor(level=1, write_content_size=False).compress
    checked = zstandard.ZstdCompressor(level=1, write_checksum=True, write_content_size=False).compress
    skippable = b"\x53\x2a\x4d\x18\x05\x00\x00\x00hello"
    for packed in (
        plain(data),
        unsized(data),
        checked(data),
        plain(data[:1000]) + checked(data[1000:50000]) + unsized(data[50000:]),
        checked(bytes(10)).join((skippable, b"")) + plain(data[10:]),
        plain(b"") + plain(data),
    ):
        expected = bytes(10) + data[10:] if packed.startswith(skippable) else data
        assert expand_zstd(memoryview(packed + AFTER), len(data)) == expected
        assert expand_zstd(memoryview(packed + plain(NOISE)), len(data)) == expected


def test_cut_or_endless_zstd_clusters_are_refused() -> None:
    packed = zstandard.ZstdCompressor(level=1).compress(NOISE)
    for end in (0, 3, 5, 10, len(packed) - 1):
        with pytest.raises(Unpackable):
            expand_zstd(memoryview(packed)[:end], len(NOISE))
    empty = zstandard.ZstdCompressor(level=1).compress(b"")
    with pytest.raises(Unpackable, match="frames"):
        expand_zstd(memoryview(empty * 100_000), MiB)
    with pytest.raises(Unpackable):
        expand_zstd(memoryview(b"\x50\x2a\x4d\x18" + b"\xff" * 100), MiB)
