"""Streams of frames that lie: every one is a FormatError, never wrong bytes."""

from __future__ import annotations

import struct
from array import array
from dataclasses import replace

import pytest

from pipeline.errors import FormatError
from stages.catalog import CATALOG
from stages.compress.index import FrameIndex
from stages.decode.opening import is_known, open_image
from tests.compress.streams import Stream, compress, mixed_image
from tests.decode.images import BytesReader

CODECS = ("lz4", "zstd", "gzip")


@pytest.fixture(scope="module", params=CODECS)
def codec(request: pytest.FixtureRequest) -> str:
    """Every codec."""
    return str(request.param)


@pytest.fixture(scope="module")
def stream(codec: str) -> Stream:
    """The mixed image in its frames."""
    spec = CATALOG.find(f"compress.{codec}")
    assert spec is not None
    return compress(spec, spec.options(), mixed_image())


@pytest.fixture(scope="module")
def zstd_stream() -> bytes:
    """A zstd stream with its seek table."""
    spec = CATALOG.find("compress.zstd")
    assert spec is not None
    return bytes(compress(spec, spec.options(), mixed_image()).data)


def index_of(stream: Stream) -> FrameIndex:
    assert stream.index is not None
    return stream.index


async def read_all(data: bytes, codec: str, index: FrameIndex | None) -> bytes:
    image = await open_image(BytesReader(data), f"raw+{codec}", index=index)
    return await image.read(0, image.size)


async def test_zstd_needs_no_index_and_the_others_do(stream: Stream, codec: str) -> None:
    if codec == "zstd":
        assert await read_all(bytes(stream.data), codec, None) == mixed_image()
    else:
        with pytest.raises(FormatError, match="without an index"):
            await read_all(bytes(stream.data), codec, None)


@pytest.mark.parametrize("place", [0.0, 0.1, 0.5, 0.9])
async def test_changed_byte_is_found(stream: Stream, codec: str, place: float) -> None:
    data = bytearray(stream.data)
    frames_end = sum(index_of(stream).lengths)
    data[int(frames_end * place) + 40] ^= 0x10
    with pytest.raises(FormatError):
        await read_all(bytes(data), codec, index_of(stream))


async def test_stream_that_was_cut_is_found(stream: Stream, codec: str) -> None:
    with pytest.raises(FormatError):
        await read_all(bytes(stream.data[:-1]), codec, index_of(stream))


@pytest.mark.parametrize("lie", ["moved border", "longer frame", "other window", "other size", "frame missing"])
async def test_index_that_lies_is_found(stream: Stream, codec: str, lie: str) -> None:
    index = index_of(stream)
    lengths = index.lengths[:]
    if lie == "moved border":
        lengths[2], lengths[3] = lengths[2] - 1, lengths[3] + 1
    elif lie == "longer frame":
        lengths[1] += 1
    elif lie == "frame missing":
        lengths = array("I", [*lengths[:2], lengths[2] + lengths[3], *lengths[4:]])
    window = index.window // 2 if lie == "other window" else index.window
    size = index.size - 1 if lie == "other size" else index.size
    false = replace(index, lengths=lengths, window=window, size=size)
    if codec == "zstd" and lie == "other window":
        pytest.skip("the seek table has a length for every frame")
    with pytest.raises(FormatError):
        await read_all(bytes(stream.data), codec, false)


@pytest.mark.parametrize(
    "field, value",
    [("window", 0), ("window", -1), ("size", True), ("size", 1 << 62), ("lengths", "AAAA"), ("lengths", 7)],
)
def test_damaged_index_of_a_manifest_is_refused(stream: Stream, field: str, value: object) -> None:
    with pytest.raises(FormatError, match="frame index"):
        FrameIndex.from_json({**index_of(stream).to_json(), field: value})


@pytest.mark.parametrize("frames", [0, 1, 3, 1 << 27, (1 << 32) - 1])
async def test_seek_table_that_lies_about_its_length_is_refused(zstd_stream: bytes, frames: int) -> None:
    data = bytearray(zstd_stream)
    data[-9:] = struct.pack("<IBI", frames, 0, 0x8F92EAB1)
    with pytest.raises(FormatError, match="seek table"):
        await read_all(bytes(data), "zstd", None)


async def test_seek_table_with_reserved_bits_is_refused(zstd_stream: bytes) -> None:
    """They may come to mean something that changes how the table is read."""
    for bit in (2, 3, 4, 5, 6):
        data = bytearray(zstd_stream)
        data[-5] |= 1 << bit
        with pytest.raises(FormatError, match="descriptor"):
            await read_all(bytes(data), "zstd", None)


async def test_bytes_between_the_frames_are_refused(stream: Stream, codec: str) -> None:
    index = index_of(stream)
    first = index.lengths[0]
    lengths = array("I", [first + 4, *index.lengths[1:]])
    data = stream.data[:first] + b"more" + stream.data[first:]
    if codec == "zstd":  # its own table would contradict the index
        pytest.skip("the seek table is in the stream")
    with pytest.raises(FormatError, match="does not end where"):
        await read_all(bytes(data), codec, replace(index, lengths=lengths))


def test_bomb_unpacks_no_more_than_the_index_says() -> None:
    import lz4.frame
    import zstandard

    from stages.decode.framed import _UNPACKERS

    zeros = bytes(64 << 20)
    for codec, packed in (
        ("lz4", lz4.frame.compress(zeros)),
        ("zstd", zstandard.ZstdCompressor().compress(zeros)),
        ("gzip", __import__("gzip").compress(zeros, 1)),
    ):
        with pytest.raises(FormatError):
            _UNPACKERS[codec](packed, 1 << 20, 0)


def test_formats_with_a_codec_are_known() -> None:
    assert is_known("qcow2+zstd")
    assert not is_known("qcow2+xz")
    assert not is_known("raw+")
    assert not is_known("+lz4")
