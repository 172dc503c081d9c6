"""Files of ext2, ext3 and ext4, held against what the kernel says about the same filesystem."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.units import MiB
from stages.disk.live import LiveView
from tests.disk.making import blank, mounted, need, needs_root, run
from tests.disk.truth import difference, opened, populate, seen_by_kernel, seen_by_us

FEATURES = {
    "ext2": "-t ext2",
    "ext2 with blocks of 1 KiB": "-t ext2 -b 1024 -I 128",
    "ext2 without types in folders": "-t ext2 -O ^filetype,^dir_index",
    "ext3": "-t ext3",
    "ext4": "-t ext4",
    "ext4 with blocks of 1 KiB": "-t ext4 -b 1024",
    "ext4 with blocks of 2 KiB and small inodes": "-t ext4 -b 2048 -I 128",
    "ext4 without checksums": "-t ext4 -O ^metadata_csum,uninit_bg",
    "ext4 without extents": "-t ext4 -O ^extents,^64bit",
    "ext4 with checksum seed": "-t ext4 -O metadata_csum_seed",
    "ext4 with bigalloc": "-t ext4 -O bigalloc -C 65536",
    "ext4 with meta_bg": "-t ext4 -O meta_bg,^resize_inode -g 8192",
    "ext4 with inline data": "-t ext4 -O inline_data",
    "ext4 with inline data in large inodes": "-t ext4 -I 1024 -O inline_data",
    "ext4 with small groups": "-t ext4 -g 4096",
}


@needs_root
@pytest.mark.parametrize("features", FEATURES)
async def test_every_name_attribute_and_byte_is_what_the_kernel_says(features: str, tmp_path: Path) -> None:
    need("mke2fs", "chattr")
    image = blank(tmp_path / "image", 200 * MiB)
    run("mke2fs", "-q", "-F", "-L", "a label", *FEATURES[features].split(), image)
    with mounted(image) as folder:
        populate(folder)
    with mounted(image, "loop,ro") as folder:
        truth = await seen_by_kernel(folder)
        space = await LiveView(folder).space("/")
    async with opened(image) as tree:
        assert difference(await seen_by_us(tree), truth) == []
        assert (tree.label, tree.dirty) == ("a label", None)
        assert tree.uuid == run("blkid", "-p", "-o", "value", "-s", "UUID", image).strip()
        assert tree.kind == run("blkid", "-p", "-o", "value", "-s", "TYPE", image).strip()
        ours = await tree.space()
    assert (ours.free, ours.inodes, ours.inodes_free) == (space.free, space.inodes, space.inodes_free)
    assert abs(ours.total - space.total) < 16 * MiB
