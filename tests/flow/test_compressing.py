"""Chains with a compressor: the same stream whatever the threads, bounded memory, any inner format verified."""

from __future__ import annotations

import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import anyio
import pytest

from pipeline.flow.buffers import Ledger, Pool
from pipeline.flow.compressing import Gatherer
from pipeline.flow.items import Piece
from pipeline.units import KiB, MiB
from tests.chains import export, write_toml
from tests.disks.letters import write_disk

TOOLS = {"lz4": "lz4", "zstd": "zstd", "gzip": "gzip"}
INNER = {
    "raw": "encode.raw",
    "qcow2": 'encode.qcow2; compression = "none"',
    "vhd": 'encode.vhd; variant = "fixed"',
    "vmdk": "encode.vmdk",
}


def toml(folder: Path, disk: Path, image: Path, *stages: str, memory: str = "96 MiB") -> Path:
    source = f'read.disk; path = "{disk}"'
    sink = f'write.file; path = "{image}"; overwrite = true'
    return write_toml(
        folder / "export.toml", source, "checksum.guest", "sparse.zeros", *stages, sink, "verify.readback",
        memory=memory,
    )  # fmt: skip


@pytest.mark.parametrize("codec", TOOLS)
@pytest.mark.parametrize("format", INNER)
async def test_stream_is_the_image_that_the_encoder_makes_alone(tmp_path: Path, format: str, codec: str) -> None:
    disk = write_disk(tmp_path / "disk.raw", "AB0-A" + "-" * 9 + "C0", tail=1024)
    plain, packed = tmp_path / "image", tmp_path / f"image.{codec}"
    made = [
        await export(toml(tmp_path, disk, packed, INNER[format], f"compress.{codec}"), fuse=fuse)
        for fuse in (True, False)
    ]
    assert [one.state for one in made] == ["identical", "identical"]
    assert made[0].manifest.image.format == f"{format}+{codec}"
    assert made[0].manifest.facts["frame index"]["codec"] == codec
    # The order in which a plain qcow2 is laid out depends on the target; a sha256 forces the one of a stream.
    await export(toml(tmp_path, disk, plain, INNER[format], "checksum.image; sha256 = true"))
    unpacked = subprocess.run([TOOLS[codec], "-dc"], input=packed.read_bytes(), capture_output=True, check=True).stdout
    assert unpacked == plain.read_bytes()


@pytest.mark.parametrize("memory", ["48 MiB", "96 MiB"])
async def test_image_with_a_cluster_from_each_buffer_does_not_run_out_of_them(tmp_path: Path, memory: str) -> None:
    """A plain qcow2 of one cluster a window: a window of the stream takes from 32 buffers, and there are ten."""
    disk = tmp_path / "disk.raw"
    with open(disk, "wb") as file:
        for window in range(80):
            file.seek(window * 2 * MiB)
            file.write(b"%d" % window * 1000)
        file.truncate(160 * MiB)
    image = tmp_path / "image.zst"
    with anyio.fail_after(60):
        outcome = await export(toml(tmp_path, disk, image, INNER["qcow2"], "compress.zstd", memory=memory))
    assert outcome.state == "identical"


async def test_window_holds_on_to_two_buffers_and_copies_from_more() -> None:
    window = 256 * KiB
    pool, ledger = Pool(window, 3), Ledger(2 * window)
    in_use: list[int] = []

    async def pieces() -> AsyncIterator[Piece]:
        for number in range(4):
            lease = await pool.lease()
            lease.buffer[:] = bytes([number + 1]) * window
            slice_ = lease.into_slice(64 * KiB)
            yield Piece(number * 64 * KiB, 64 * KiB, slice_, 64 * KiB)
            in_use.append(pool.in_use)

    gatherer = Gatherer(window=window, ledger=ledger, made_max=2 * window)
    with anyio.fail_after(5):
        found = [one async for one in gatherer.windows(pieces())]
    (one,) = found
    assert bytes(one.window.joined()) == b"".join(bytes([number]) * 64 * KiB for number in (1, 2, 3, 4))
    assert (in_use, pool.in_use) == ([1, 2, 0, 0], 0)
    assert one.charge is not None
    one.charge.release()
    pool.close()


async def test_long_hole_becomes_few_items_and_its_guest_bytes_are_spread() -> None:
    async def pieces() -> AsyncIterator[Piece]:
        yield Piece(0, 100 * MiB + 5, None, 100 * MiB + 5)

    gatherer = Gatherer(window=MiB, ledger=Ledger(0), made_max=2 * MiB)
    found = [one.window async for one in gatherer.windows(pieces())]
    assert [(one.offset // MiB, one.length) for one in found] == [(0, 64 * MiB), (64, 36 * MiB), (100, 5)]
    assert [one.guest_bytes for one in found] == [64 * MiB, 36 * MiB, 5]
