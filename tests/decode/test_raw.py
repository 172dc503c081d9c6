"""The raw reader, and how holes of a local file are passed over."""

from __future__ import annotations

import os
from pathlib import Path

from pipeline.units import MiB
from stages.decode.opening import open_image
from stages.store.file import open_file_reader
from tests.decode.images import BytesReader, content, mixed_disk


async def test_a_raw_image_is_the_disk() -> None:
    disk = mixed_disk(3 * MiB + 512)
    image = await open_image(BytesReader(disk), "raw")
    assert image.size == len(disk)
    assert await content(image) == disk
    assert [(one.offset, one.length, one.is_zero) async for one in image.extents(512, 9)] == [(512, 9, False)]
    assert await image.read(len(disk), 0) == b""


async def test_a_large_fetch_is_split_into_bounded_reads() -> None:
    reader = BytesReader(mixed_disk(20 * MiB))
    image = await open_image(reader, "raw")
    assert await image.read(0, 100) == reader.data[:100]
    reader.reads.clear()
    fetched = await image.fetch(5, 20 * MiB - 5)
    made = bytearray(20 * MiB - 5)
    image.decode(fetched, memoryview(made))
    assert made == reader.data[5:]
    assert max(length for _, length in reader.reads) == 8 * MiB


async def test_holes_of_a_local_file_are_zero_extents(tmp_path: Path) -> None:
    path = tmp_path / "sparse.raw"
    path.touch()
    os.truncate(path, 64 * MiB)
    file = os.open(path, os.O_WRONLY)
    os.pwrite(file, b"x" * MiB, 8 * MiB)
    os.pwrite(file, b"y" * MiB, 63 * MiB)
    os.close(file)
    async with open_file_reader(path) as reader:
        image = await open_image(reader, "raw")
        extents = [(one.offset // MiB, one.length // MiB, one.is_zero) async for one in image.extents(0, image.size)]
        part = [(one.offset // MiB, one.length // MiB, one.is_zero) async for one in image.extents(9 * MiB, 9 * MiB)]
    assert extents == [(0, 8, True), (8, 1, False), (9, 54, True), (63, 1, False)]
    assert part == [(9, 9, True)]
