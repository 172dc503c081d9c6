"""Files of ext2, ext3 and ext4, held against what the kernel says about the same filesystem."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest

from pipeline.errors import FormatError
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


@pytest.mark.parametrize("options", ["-b 16384", "-b 65536", "-b 65536 -I 512 -O inline_data", "-O quota,project"])
async def test_what_this_kernel_may_not_mount_is_read(options: str, tmp_path: Path) -> None:
    """Blocks larger than a page: mke2fs itself copies a tree into them."""
    need("mke2fs")
    tree = tmp_path / "tree"
    (tree / "many" / "deep").mkdir(parents=True)
    for number in range(900):
        (tree / "many" / f"a name that takes some room, number {number}").write_text("x" * number)
    (tree / "large").write_bytes(os.urandom(3 * MiB))
    (tree / "link").symlink_to("t" * 200)
    image = blank(tmp_path / "image", 300 * MiB)
    run("mke2fs", "-q", "-F", "-t", "ext4", *options.split(), "-d", tree, image)
    truth = await seen_by_kernel(tree)
    async with opened(image) as found:
        ours = await seen_by_us(found)
    ours.pop("lost+found")
    assert difference({**ours, "": truth[""]}, truth) == []


async def test_case_does_not_count_in_folders_that_say_so(tmp_path: Path) -> None:
    need("mke2fs", "debugfs")
    image = blank(tmp_path / "image", 16 * MiB)
    run("mke2fs", "-q", "-F", "-t", "ext4", "-O", "casefold", image)
    (tmp_path / "data").write_text("here")
    run("debugfs", "-w", image, text=f"mkdir a\nsif a flags 0x40080000\ncd a\nwrite {tmp_path / 'data'} Straße\n")
    async with opened(image) as tree:
        folder = await tree.lookup(tree.root, "a")
        assert await tree.read(await tree.lookup(folder, "STRASSE"), 0, 9) == b"here"
        with pytest.raises(FileNotFoundError):
            await tree.lookup(tree.root, "A")


async def test_an_unclean_filesystem_is_read_and_says_so(tmp_path: Path) -> None:
    need("mke2fs", "debugfs")
    image = blank(tmp_path / "image", 16 * MiB)
    for command, word in (("feature needs_recovery", "journal"), ("set_super_value state 2", "damaged")):
        run("mke2fs", "-q", "-F", "-t", "ext4", image)
        run("debugfs", "-w", image, "-R", command)
        async with opened(image) as tree:
            assert word in str(tree.dirty)
            assert [one.name for one in await tree.entries(tree.root)] == ["lost+found"]


async def test_a_flipped_bit_is_noticed_where_there_are_checksums(tmp_path: Path) -> None:
    need("mke2fs", "debugfs")
    image = blank(tmp_path / "image", 16 * MiB)
    run("mke2fs", "-q", "-F", "-t", "ext4", image)
    table = int(run("dumpe2fs", image).split("Inode table at ")[1].split("-")[0])
    folder = int(run("debugfs", image, "-R", "blocks /").split()[0])
    good = image.read_bytes()
    for place, word in ((table * 1024 + 256 + 20, "an inode"), (folder * 1024 + 40, "a folder")):
        data = bytearray(good)
        data[place] ^= 1
        image.write_bytes(data)
        async with opened(image) as tree:
            with pytest.raises(FormatError, match=f"the checksum of {word} is wrong"):
                await tree.entries(tree.root)


async def test_unknown_features_are_not_guessed_at(tmp_path: Path) -> None:
    need("mke2fs")
    image = blank(tmp_path / "image", 16 * MiB)
    run("mke2fs", "-q", "-F", "-t", "ext4", "-O", "^metadata_csum", image)
    with image.open("r+b") as file:
        file.seek(1024 + 96)
        (old,) = struct.unpack("<I", file.read(4))
        file.seek(1024 + 96)
        file.write(struct.pack("<I", old | 1 << 27))
    with pytest.raises(FormatError, match="0x8000000"):
        async with opened(image):
            pass
