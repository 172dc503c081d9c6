"""Files of XFS, held against what the kernel says about the same filesystem."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.units import MiB
from stages.disk.live import LiveView
from tests.disk.making import blank, mounted, need, needs_root, run
from tests.disk.truth import difference, opened, populate, seen_by_kernel, seen_by_us

FEATURES = {
    "version 5": "",
    "version 4": "-m crc=0",
    "version 4 with types": "-m crc=0 -n ftype=1",
    "version 4 with blocks of 512 bytes": "-m crc=0 -b size=512",
    "blocks of 1 KiB": "-b size=1024",
    "large folder blocks": "-n size=16384",
    "large inodes": "-i size=2048",
    "without bigtime and large counts": "-m bigtime=0 -i nrext64=0",
    "reflink and rmapbt": "-m reflink=1,rmapbt=1",
    "many groups": "-d agcount=12",
}


@needs_root
@pytest.mark.parametrize("features", FEATURES)
async def test_every_name_attribute_and_byte_is_what_the_kernel_says(features: str, tmp_path: Path) -> None:
    need("mkfs.xfs", "chattr")
    image = blank(tmp_path / "image", 320 * MiB)
    run("mkfs.xfs", "-q", "-f", "-L", "a label", *FEATURES[features].split(), image)
    with mounted(image) as folder:
        populate(folder)
    with mounted(image, "loop,ro") as folder:
        truth = await seen_by_kernel(folder)
        space = await LiveView(folder).space("/")
    async with opened(image) as tree:
        assert difference(await seen_by_us(tree), truth) == []
        assert (tree.label, tree.dirty, tree.kind) == ("a label", None, "xfs")
        assert tree.uuid == run("blkid", "-p", "-o", "value", "-s", "UUID", image).strip()
        ours = await tree.space()
    assert ours.total == space.total
    assert abs(ours.free - space.free) < 32 * MiB, "the kernel sets some aside"
