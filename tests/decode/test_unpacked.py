"""Images inside streams that the usual tools packed, without any index: told, read, converted and inspected."""

from __future__ import annotations

import gzip
import json
import random
import struct
import subprocess
import time
import tracemalloc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import anyio
import pytest
import zstandard
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.__main__ import main
from pipeline.errors import FormatError
from pipeline.flow.items import RangeReader
from pipeline.units import KiB, MiB
from stages.decode.image import DecodedImage
from stages.decode.named import NamedImage, open_files
from stages.decode.probing import probe
from stages.decode.unpacked import UnpackedStream
from tests.decode.images import BytesReader, content, mixed_disk, qemu_convert, run
from tests.decode.made import MEMORY_MAX, TIME_MAX_S, bounded

DISK = mixed_disk(6 * MiB + 512)
# Codec, and a command that packs stdin to stdout.
TOOLS = {
    "gzip": ("gzip", ["gzip", "-c"]),
    "gzip -9": ("gzip", ["gzip", "-9c"]),
    "pigz": ("gzip", ["pigz", "-c"]),
    "pigz independent": ("gzip", ["pigz", "-ic"]),
    "zstd": ("zstd", ["zstd", "-qc"]),
    "zstd -19": ("zstd", ["zstd", "-19", "-qc"]),
    "zstd without checksum": ("zstd", ["zstd", "-qc", "--no-check"]),
    "zstd threads": ("zstd", ["zstd", "-T2", "-B1MiB", "-qc"]),
    "lz4": ("lz4", ["lz4", "-c"]),
    "lz4 -9 linked": ("lz4", ["lz4", "-9", "-BD", "-c"]),
    "lz4 small blocks": ("lz4", ["lz4", "-B4", "-BX", "--no-frame-crc", "-c"]),
}
SUFFIXES = {"gzip": ".gz", "zstd": ".zst", "lz4": ".lz4"}


def packed_by(tool: str, data: bytes) -> bytes:
    """What the tool makes of it."""
    return subprocess.run(TOOLS[tool][1], input=data, capture_output=True, check=True).stdout


SMALL = {tool: packed_by(tool, DISK[: 300 * KiB]) + packed_by(tool, b"and more") for tool in ("gzip", "zstd", "lz4")}


@asynccontextmanager
async def opened(path: Path, format: str = "auto") -> AsyncIterator[DecodedImage]:
    """The image as every command opens it."""
    async with open_files(NamedImage(place=str(path), format=format)) as files:
        yield await files.open_image()


@pytest.mark.parametrize("tool", TOOLS)
async def test_disk_comes_out_of_what_a_tool_packed(tmp_path: Path, tool: str) -> None:
    codec, _ = TOOLS[tool]
    path = tmp_path / f"disk.raw{SUFFIXES[codec]}"
    path.write_bytes(packed_by(tool, DISK))
    for format in ("auto", f"raw+{codec}"):
        async with opened(path, format) as image:
            assert image.format == "raw"
            assert image.size == len(DISK)
            assert await content(image, window=MiB) == DISK


@pytest.mark.parametrize("tool", ["gzip", "zstd", "lz4"])
@pytest.mark.parametrize("cut", [True, False])
async def test_many_frames_after_each_other_are_one_stream(tmp_path: Path, tool: str, cut: bool) -> None:
    """Begins of frames are places to go back to: reading backward costs a frame, not the stream."""
    codec, _ = TOOLS[tool]
    disk = mixed_disk(40 * MiB, seed=2)
    step = 700_001 if cut else 5 * MiB
    parts = [packed_by(tool, disk[at : at + step]) for at in range(0, len(disk), step)]
    if codec == "zstd":
        skippable = struct.pack("<II", 0x184D2A53, 5) + b"hello"
        parts = [skippable, struct.pack("<II", 0x184D2A50, 0), *parts, skippable]
    path = tmp_path / f"disk.img{SUFFIXES[codec]}"
    path.write_bytes(b"".join(parts))
    async with opened(path) as image:
        assert image.size == len(disk)
        for start in reversed(range(0, len(disk), 8 * MiB)):
            assert await image.read(start + 5, 100_000) == disk[start + 5 : start + 100_005]


@pytest.mark.parametrize("codec, tool", [("gzip", "gzip"), ("zstd", "zstd"), ("lz4", "lz4")])
@pytest.mark.parametrize("arguments", [(), ("-c",)])
async def test_image_of_any_format_is_told_inside_a_stream(
    tmp_path: Path, codec: str, tool: str, arguments: tuple[str, ...]
) -> None:
    disk = DISK[: 6 * MiB]
    path = tmp_path / "anything"
    path.write_bytes(packed_by(tool, qemu_convert(tmp_path, disk, *arguments)))
    found = await probe(BytesReader(path.read_bytes()))
    assert found.format == f"qcow2+{codec}"
    async with opened(path) as image:
        assert await content(image) == disk


async def test_stream_that_says_nothing_about_its_content_is_not_guessed(tmp_path: Path) -> None:
    for tool in ("gzip", "zstd", "lz4"):
        packed = BytesReader(packed_by(tool, DISK))
        for name in ("", "backup", "disk.qcow2" + SUFFIXES[tool], "disk.raw"):
            with pytest.raises(FormatError, match="neither its begin nor its name") as caught:
                await probe(packed, name_hint=name)
            assert f"raw+{tool}" in caught.value.hint
        assert (await probe(packed, name_hint="/a/DISK.IMG" + SUFFIXES[tool].upper())).format == f"raw+{tool}"
    with pytest.raises(FormatError, match="of the old kind"):
        await probe(BytesReader(subprocess.run(["lz4", "-lc"], input=DISK, capture_output=True, check=True).stdout))


async def test_probe_reads_the_begin_only() -> None:
    packed = BytesReader(packed_by("zstd", random.Random(5).randbytes(4 * MiB)))
    await probe(packed, name_hint="x.raw.zst")
    assert sum(length for _, length in packed.reads) < 512 * KiB


@pytest.mark.parametrize("tool", TOOLS)
async def test_damaged_or_cut_stream_is_refused_before_a_byte_is_taken(tmp_path: Path, tool: str) -> None:
    codec, _ = TOOLS[tool]
    packed = packed_by(tool, DISK)
    path = tmp_path / "disk"
    # The last bytes are a checksum, or without one the end mark.
    for end in (len(packed) - 1, len(packed) - 5, len(packed) // 2, 40, 5, 1):
        path.write_bytes(packed[:end])
        with pytest.raises(FormatError):
            async with opened(path, f"raw+{codec}"):
                pass
    if "without" not in tool and "small" not in tool:
        flipped = bytearray(packed)
        flipped[len(packed) // 2] ^= 0x10
        path.write_bytes(flipped)
        with pytest.raises(FormatError):
            async with opened(path, f"raw+{codec}"):
                pass
    path.write_bytes(packed + b"something else")
    with pytest.raises(FormatError):
        async with opened(path, f"raw+{codec}"):
            pass


@settings(max_examples=60, deadline=None)
@given(
    tool=st.sampled_from(["gzip", "zstd", "lz4"]),
    changes=st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 255)), min_size=1, max_size=4),
    end=st.integers(0, 1 << 20),
)
def test_whatever_is_changed_it_unpacks_or_is_refused(tool: str, changes: list[tuple[int, int]], end: int) -> None:
    packed = bytearray(SMALL[tool])
    for at, value in changes:
        packed[at % 40 if at % 2 else at % len(packed)] = value  # half of them in the headers
    del packed[max(1, end % (2 * len(packed))) :]

    async def read() -> None:
        reader = BytesReader(bytes(packed))
        stream = UnpackedStream(reader, tool, tool)
        await stream.measure()
        assert len(await stream.read(0, stream.size)) == stream.size
        assert all(offset + length <= len(packed) for offset, length in reader.reads)

    with bounded(), suppress(FormatError):
        anyio.run(read)


async def test_bomb_ends_in_time_and_memory(tmp_path: Path) -> None:
    """262144 blocks of zeros of 128 KiB each, in 1 MiB."""
    frame = b"\x28\xb5\x2f\xfd" + b"\x00\x58"  # no size, a window of 2 MiB
    block = struct.pack("<I", 128 * KiB << 3 | 1 << 1)[:3] + b"\0"
    path = tmp_path / "bomb.raw.zst"
    path.write_bytes(frame + block * (MiB // 4))
    begun = time.process_time()  # of this process alone: others are busy, too
    with pytest.raises(FormatError, match="unpack to more than") as caught:
        async with opened(path):
            pass
    assert time.process_time() - begun < 2 * TIME_MAX_S
    assert "zstd -d" in caught.value.hint
    tracemalloc.start()  # apart from the time: this much work is several times slower when it is traced
    try:
        with pytest.raises(FormatError, match="unpack to more than"):
            async with opened(path):
                pass
        assert tracemalloc.get_traced_memory()[1] < MEMORY_MAX
    finally:
        tracemalloc.stop()  # or all later tests of this process are traced


async def test_window_that_would_take_all_memory_is_refused(tmp_path: Path) -> None:
    parameters = zstandard.ZstdCompressionParameters.from_level(3, window_log=27, write_content_size=False)
    stream = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    path = tmp_path / "disk"
    path.write_bytes(stream.compress(DISK) + stream.flush())
    with pytest.raises(FormatError, match="memory"):
        async with opened(path, "raw+zstd"):
            pass


async def test_going_back_many_times_ends_in_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    """One zstd frame has no place to go back to but its begin."""
    monkeypatch.setattr("stages.decode.unpacked._AGAIN_FREE", 0)
    disk = mixed_disk(20 * MiB, seed=3)
    stream = UnpackedStream(BytesReader(packed_by("zstd", disk)), "zstd", "zstd")
    await stream.measure()
    for start in range(0, len(disk), MiB):  # in order: nothing is refused
        assert await stream.read(start, MiB) == disk[start : start + MiB]

    async def back_and_forth() -> None:
        for _ in range(20):
            await stream.read(10 * MiB, 10)
            await stream.read(0, 10)

    with pytest.raises(FormatError, match="many times over") as caught:
        await back_and_forth()
    assert "zstd -d" in caught.value.hint


async def test_next_bytes_are_read_while_the_last_are_unpacked() -> None:
    """A store far away: a read has come back before the bytes before it are used up."""
    disk = random.Random(9).randbytes(12 * MiB)

    class Watched(BytesReader):
        used = 0
        early = 0

        async def read(self, offset: int, length: int) -> bytes:
            self.early += offset > stream._cursor.at - len(stream._cursor.rest)
            return await super().read(offset, length)

    packed = Watched(gzip.compress(disk, 0))
    stream = UnpackedStream(packed, "gzip")
    for start in range(0, len(disk), MiB):
        assert await stream.read(start, MiB) == disk[start : start + MiB]
    starts = [offset for offset, _ in packed.reads]
    assert starts == sorted(set(starts))  # nothing twice
    assert packed.early >= len(starts) - 3


async def test_read_that_failed_ahead_is_told_when_it_is_needed() -> None:
    disk = random.Random(9).randbytes(8 * MiB)

    class Failing(BytesReader):
        async def read(self, offset: int, length: int) -> bytes:
            if offset + length > 5 * MiB:
                raise FormatError("the line broke")
            return await super().read(offset, length)

    stream: RangeReader = UnpackedStream(Failing(gzip.compress(disk, 0)), "gzip")
    assert await stream.read(0, 2 * MiB) == disk[: 2 * MiB]
    with pytest.raises(FormatError, match="the line broke"):
        await stream.read(2 * MiB, 6 * MiB)


def test_commands_take_a_packed_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    disk = DISK[: 6 * MiB]
    Path("disk.raw").write_bytes(disk)
    run("zstd", "-q", "disk.raw", "-o", "disk.raw.zst")
    run("gzip", "-k", "disk.raw")
    for packed in ("disk.raw.zst", "disk.raw.gz"):
        said = CliRunner().invoke(main, ["inspect", packed, "--json", "--deep"])
        assert said.exit_code == 0, said.stderr
        told = json.loads(said.stdout.splitlines()[-1])
        assert told["format"] == ("raw+zstd" if packed.endswith("zst") else "raw+gzip")
        assert told["info"]["virtual_size"] == len(disk)
        said = CliRunner().invoke(main, ["convert", packed, f"{packed}.qcow2", "-c"])
        assert said.exit_code == 0, said.stderr
        run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", "disk.raw", f"{packed}.qcow2")
