"""ext2, ext3 and ext4 that mke2fs made, in every feature set that changes where blocks are accounted for."""

from __future__ import annotations

import struct
import time
from pathlib import Path

import pytest

from pipeline.units import GiB, MiB
from stages.disk.usage import Refusal, UsedMap
from tests.disk.making import (
    blank,
    copy_used,
    fill,
    hashes,
    map_of,
    mounted,
    need,
    needs_root,
    partclone_blocks,
    run,
)

FEATURES: dict[str, tuple[str, int]] = {
    "ext2": ("-t ext2", 64 * MiB),
    "ext3": ("-t ext3", 96 * MiB),
    "ext4": ("-t ext4", 160 * MiB),
    "ext4 with blocks of 1 KiB": ("-t ext4 -b 1024", 96 * MiB),
    "ext2 with blocks of 1 KiB": ("-t ext2 -b 1024", 48 * MiB),
    "ext4 with blocks of 2 KiB": ("-t ext4 -b 2048", 96 * MiB),
    "ext4 without checksums": ("-t ext4 -O ^metadata_csum,uninit_bg", 600 * MiB),
    "ext4 without uninit": ("-t ext4 -O ^metadata_csum,^uninit_bg", 600 * MiB),
    "ext4 without 64bit": ("-t ext4 -O ^64bit", 600 * MiB),
    "ext4 with checksum seed": ("-t ext4 -O metadata_csum_seed", 160 * MiB),
    "ext4 without flex_bg": ("-t ext4 -O ^flex_bg", 700 * MiB),
    "ext4 with bigalloc": ("-t ext4 -O bigalloc -C 65536", 700 * MiB),
    "ext4 with bigalloc and blocks of 1 KiB": ("-t ext4 -O bigalloc -b 1024 -C 16384", 300 * MiB),
    "ext4 with meta_bg": ("-t ext4 -O meta_bg,^resize_inode", 3 * GiB),
    "ext4 with meta_bg and blocks of 1 KiB": ("-t ext4 -b 1024 -O meta_bg,^resize_inode,^flex_bg", 700 * MiB),
    "ext4 with sparse_super2": ("-t ext4 -O sparse_super2,^resize_inode", 700 * MiB),
    "ext4 with small groups": ("-t ext4 -g 8192", 300 * MiB),
    "ext4 with inline data": ("-t ext4 -I 512 -O inline_data", 160 * MiB),
    "ext4 with an odd size": ("-t ext4", 150 * MiB + 3 * 512),
    "ext4 without a journal": ("-t ext4 -O ^has_journal", 96 * MiB),
    "ext4 with a fast commit journal": ("-t ext4 -O fast_commit,orphan_file", 160 * MiB),
    "ext4 of 3 GiB": ("-t ext4", 3 * GiB),
}


def make(path: Path, options: str, size: int) -> Path:
    run("mke2fs", "-q", "-F", *options.split(), blank(path, size))
    return path


@needs_root
@pytest.mark.parametrize("features", FEATURES)
async def test_a_copy_of_the_used_blocks_is_the_same_filesystem(features: str, tmp_path: Path) -> None:
    need("mke2fs", "e2fsck")
    image = make(tmp_path / "image", *FEATURES[features])
    with mounted(image) as folder:
        fill(folder)
    used = await map_of(image)
    assert isinstance(used, UsedMap), used
    assert 0 <= used.used_bytes - used.units_used * used.unit < 4096, "and what mke2fs left over at the end"
    copy = copy_used(image, used)
    run("e2fsck", "-fn", copy)
    with mounted(image, "loop,ro") as before:
        wanted = hashes(before)
    with mounted(copy, "loop,ro") as after:
        assert hashes(after) == wanted
    need("partclone.extfs")
    assert used.units_used == partclone_blocks("extfs", image)


@pytest.mark.parametrize("options", ["-b 16384", "-b 65536", "-O quota,project", "-O casefold,encrypt,ea_inode"])
async def test_what_this_kernel_does_not_mount_is_mapped(options: str, tmp_path: Path) -> None:
    """Blocks larger than a page, and features it was built without: debugfs fills them."""
    need("mke2fs", "debugfs", "partclone.extfs")
    image = make(tmp_path / "image", f"-t ext4 {options}", 300 * MiB)
    data = tmp_path / "data"
    data.write_bytes(bytes(range(256)) * 8000)
    run("debugfs", "-w", image, text=f"write {data} one\nwrite {data} two\nrm one\n")
    run("e2fsck", "-fy", image, expect=(0, 1))
    used = await map_of(image)
    assert isinstance(used, UsedMap), used
    copy = copy_used(image, used)
    run("e2fsck", "-fn", copy)
    run("debugfs", copy, "-R", f"dump two {tmp_path / 'out'}")
    assert (tmp_path / "out").read_bytes() == data.read_bytes()
    assert used.units_used == partclone_blocks("extfs", image)


async def test_the_map_of_100_gib_takes_less_than_a_second(tmp_path: Path) -> None:
    need("mke2fs")
    image = make(tmp_path / "image", "-t ext4 -E lazy_itable_init=1", 100 * GiB)
    begun = time.process_time()
    used = await map_of(image)
    assert time.process_time() - begun < 1
    assert isinstance(used, UsedMap)
    assert used.used_bytes < 3 * GiB


async def test_a_filesystem_that_is_not_clean_is_copied_whole(tmp_path: Path) -> None:
    need("mke2fs", "debugfs")
    image = make(tmp_path / "image", "-t ext4", 64 * MiB)
    run("debugfs", "-w", image, "-R", "feature needs_recovery")
    refusal = await map_of(image)
    assert isinstance(refusal, Refusal)
    assert "journal has to be replayed" in refusal.reason
    image = make(tmp_path / "other", "-t ext2", 64 * MiB)
    run("debugfs", "-w", image, "-R", "set_super_value state 0")
    refusal = await map_of(image)
    assert isinstance(refusal, Refusal)
    assert "not clean" in refusal.reason


async def test_unknown_features_are_copied_whole(tmp_path: Path) -> None:
    need("mke2fs")
    image = make(tmp_path / "image", "-t ext4 -O ^metadata_csum", 64 * MiB)
    with image.open("r+b") as file:
        file.seek(1024 + 96)
        (old,) = struct.unpack("<I", file.read(4))
        file.seek(1024 + 96)
        file.write(struct.pack("<I", old | 1 << 27))
    refusal = await map_of(image)
    assert isinstance(refusal, Refusal)
    assert "0x8000000" in refusal.reason


@pytest.mark.parametrize("options", ["-t ext4", "-t ext4 -O ^metadata_csum,^uninit_bg"])
async def test_a_flipped_bit_in_a_bitmap_is_noticed(options: str, tmp_path: Path) -> None:
    """With checksums by the checksum, without them by the group's count."""
    need("mke2fs", "dumpe2fs")
    image = make(tmp_path / "image", options, 64 * MiB)
    block = int(run("dumpe2fs", image).split("Block bitmap at ")[1].split()[0].rstrip(","))
    with image.open("r+b") as file:
        file.seek(block * 1024 if "Block size:               1024" in run("dumpe2fs", image) else block * 4096)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))
    refusal = await map_of(image)
    assert isinstance(refusal, Refusal)
    assert "damaged" in refusal.reason
