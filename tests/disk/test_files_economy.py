"""What reading costs where every read is a request to a store: few bytes beside those that were asked for."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from pipeline.units import KiB, MiB
from stages.disk.files.opening import open_tree
from stages.disk.reading import CachedReader, Window
from stages.disk.view import DiskView
from tests.disk.making import blank, mounted, needs_root, run
from tests.disk.memory import Memory

MAKERS = {
    "ext4": ("mke2fs", "-q", "-F", "-t", "ext4"),
    "ext2": ("mke2fs", "-q", "-F", "-t", "ext2"),
    "xfs": ("mkfs.xfs", "-q", "-f"),
    "btrfs": ("mkfs.btrfs", "-q", "-f"),
}
NAMES = 10_000
LARGE = 20 * MiB


class Counting(Memory):
    """Also counts how often it is asked."""

    reads = 0

    async def read(self, offset: int, length: int) -> bytes:
        self.reads += 1
        return await super().read(offset, length)


@needs_root
@pytest.mark.parametrize("kind", MAKERS)
async def test_ten_thousand_names_and_a_large_file_cost_little(kind: str, tmp_path: Path) -> None:
    image = blank(tmp_path / "image", 320 * MiB)
    run(*MAKERS[kind], image)
    data = random.Random(1).randbytes(LARGE)
    with mounted(image) as folder:
        (folder / "many").mkdir()
        for number in range(NAMES):
            (folder / "many" / f"module number {number}.ko").touch()
        (folder / "etc").mkdir()
        (folder / "etc" / "fstab").write_text("small")
        (folder / "large").write_bytes(data)
    disk = Counting.of(image)
    assert isinstance(disk, Counting)
    view = DiskView(await open_tree(Window(CachedReader(disk), 0, disk.size)))
    assert await view.read("/etc/fstab") == b"small"
    assert disk.bytes_read < 4 * MiB
    disk.bytes_read = disk.reads = 0
    names = {one.name for one in await view.list("/many")}
    assert names == {f"module number {number}.ko" for number in range(NAMES)}
    assert disk.bytes_read < 8 * MiB
    assert disk.reads < 120
    for number in (0, 5000, NAMES - 1):
        assert (await view.stat(f"/many/module number {number}.ko")).size == 0
    disk.bytes_read = disk.reads = 0
    parts = [await view.read_at("/large", offset, MiB) for offset in range(0, LARGE, MiB)]
    assert b"".join(parts) == data
    assert disk.bytes_read < LARGE * 1.1
    assert disk.reads < 100
    assert await view.read_at("/large", 7 * MiB + 11, 50 * KiB) == data[7 * MiB + 11 :][: 50 * KiB]
