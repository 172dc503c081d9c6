"""Files of XFS, held against what the kernel says about the same filesystem."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.units import MiB
from stages.disk.live import LiveView
from stages.disk.tree import Kind
from tests.disk.making import blank, mounted, need, needs_root, run
from tests.disk.truth import difference, opened, populate, seen_by_kernel, seen_by_us

FEATURES = {
    "version 5": "",
    "blocks of 1 KiB": "-b size=1024",
    "large folder blocks": "-n size=16384",
    "large inodes": "-i size=2048",
    "without bigtime and large counts": "-m bigtime=0 -i nrext64=0",
    "reflink and rmapbt": "-m reflink=1,rmapbt=1",
    "many groups": "-d agcount=12 -l size=64m",
}


@needs_root
@pytest.mark.parametrize("features", FEATURES)
async def test_every_name_attribute_and_byte_is_what_the_kernel_says(features: str, tmp_path: Path) -> None:
    need("mkfs.xfs", "chattr")
    image = blank(tmp_path / "image", 800 * MiB)
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


@pytest.mark.parametrize("options", ["", "-n ftype=1", "-b size=512", "-b size=2048 -n size=8192"])
async def test_version_4_which_many_kernels_do_not_mount_is_read(options: str, tmp_path: Path) -> None:
    """mkfs itself fills it: short, block and leaf folders, short and long links, all kinds of files."""
    need("mkfs.xfs", "xfs_db")
    data = tmp_path / "data"
    data.write_bytes(bytes(range(256)) * 9000)
    wanted: dict[str, tuple[Kind, int, int, int]] = {"few/one": (Kind.FILE, 0o640, 7, 8)}
    lines = [
        "boot 0 0",
        "d--755 0 0",
        f"one ---644 0 0 {data}",
        "short l--777 0 0 target",
        f"long l--777 0 0 {'t' * 900}",
    ]
    lines += ["set -ug755 1 2 /dev/null", "pipe p--600 0 0", "disk b--660 0 6 8 1", "tty c--620 0 5 4 1"]
    lines += ["few d--700 3 4", f"one ---640 7 8 {data}", "$", "many d--755 0 0"]
    lines += [f"a-name-that-is-not-so-short-{number} ---600 {number} 0 /dev/null" for number in range(700)]
    lines += ["$", "some d--755 0 0", *(f"name{number} ---600 0 0 /dev/null" for number in range(40)), "$", "$"]
    (tmp_path / "proto").write_text("\n".join(lines) + "\n")
    image = blank(tmp_path / "image", 400 * MiB)
    run("mkfs.xfs", "-q", "-f", "-m", "crc=0", *options.split(), "-p", tmp_path / "proto", image)
    async with opened(image) as tree:
        ours = await seen_by_us(tree)
        content = await tree.read(await tree.lookup(tree.root, "one"), 0, data.stat().st_size + 1)
    assert content == data.read_bytes()
    assert ours["long"].content == "t" * 900
    assert ours["short"].content == "target"
    kinds = {name: ours[name].kind for name in ("pipe", "disk", "tty", "many", "one")}
    assert list(kinds.values()) == [Kind.FIFO, Kind.BLOCK, Kind.CHARACTER, Kind.DIRECTORY, Kind.FILE]
    for path, (kind, mode, uid, gid) in wanted.items():
        assert (ours[path].kind, ours[path].mode, ours[path].uid, ours[path].gid) == (kind, mode, uid, gid)
    assert ours["set"].mode == 0o6755
    assert {one.uid for path, one in ours.items() if path.startswith("many/")} == set(range(700))
    assert sum(path.startswith("some/") for path in ours) == 40
