"""Codecs of single clusters: strict readers accept them, threads don't change them."""

from __future__ import annotations

import random
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import zstandard

from pipeline.units import KiB, MiB
from stages.encode.codecs import deflate, zstd

CLUSTERS = (512, 4 * KiB, 64 * KiB, 2 * MiB)


def far_repeats(size: int) -> bytes:
    """Text that repeats itself 5000 to 30000 bytes later: the bait for a window longer than 4 KiB."""
    draw = random.Random(size)
    words = [draw.randbytes(draw.randrange(5_000, 30_000)) for _ in range(3)]
    return b"".join(draw.choice(words) for _ in range(size // 5_000 + 1))[:size]


def test_bait_is_refused_by_a_strict_reader_when_the_window_is_long() -> None:
    packer = zlib.compressobj(6, zlib.DEFLATED, -15)
    stream = packer.compress(far_repeats(64 * KiB)) + packer.flush()
    with pytest.raises(zlib.error, match="distance too far back"):
        zlib.decompressobj(-12).decompress(stream)


@pytest.mark.parametrize("size", CLUSTERS)
@pytest.mark.parametrize("level", ["fast", "small"])
def test_deflate_stays_within_a_window_of_four_kibibytes(level: Any, size: int) -> None:
    compress = deflate(level).compress
    for cluster in (far_repeats(size), bytes(size), b"ab" * (size // 2), random.Random(1).randbytes(size)):
        reader = zlib.decompressobj(-12)
        assert reader.decompress(compress(memoryview(cluster))) == cluster
        assert reader.eof
        assert not reader.unused_data


@pytest.mark.parametrize("size", CLUSTERS)
@pytest.mark.parametrize("level", ["fast", "small"])
def test_zstd_cluster_is_one_frame_with_its_size_and_without_checksum(level: Any, size: int) -> None:
    for cluster in (far_repeats(size), bytes(size), random.Random(1).randbytes(size)):
        stream = zstd(level, size).compress(memoryview(cluster))
        frame = zstandard.get_frame_parameters(stream)
        assert (frame.content_size, frame.has_checksum, frame.dict_id) == (size, False, 0)
        reader = zstandard.ZstdDecompressor().decompressobj()
        assert reader.decompress(stream) == cluster
        assert reader.eof
        assert not reader.unused_data


def test_shortest_zstd_frame_leaves_room_for_every_reference_count() -> None:
    """A host cluster is touched by no more streams than its count can hold, with one that straddles."""
    for shift in range(13):
        size = 512 << shift
        shortest = len(zstd("fast", size).compress(bytes(size)))
        assert size // shortest + 2 < (1 << 16 if size > 2 * KiB else 1 << 8)


@pytest.mark.parametrize("codec", [deflate("fast"), deflate("small"), zstd("fast", 65536), zstd("small", 65536)])
def test_threads_share_a_codec_and_get_the_same_bytes(codec: Any) -> None:
    clusters = [far_repeats(64 * KiB - number).ljust(64 * KiB, b"x") for number in range(16)]
    alone = [codec.compress(cluster) for cluster in clusters]
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(codec.compress, clusters * 4)) == alone * 4


def test_identity_tells_codecs_and_levels_apart() -> None:
    codecs = [deflate("fast"), deflate("small"), zstd("fast", 65536), zstd("small", 65536)]
    identities = {codec.identity() for codec in codecs}
    assert len(identities) == 4
    assert identities == {codec.identity() for codec in codecs}
