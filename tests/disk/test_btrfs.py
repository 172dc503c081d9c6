"""Btrfs that mkfs.btrfs made, with every checksum and profile that one or two devices can have."""

from __future__ import annotations

import hashlib
import struct
import time
from pathlib import Path

import pytest

from pipeline.units import GiB, KiB, MiB
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
    "the default": ("", 300 * MiB),
    "everything single": ("-m single -d single", 300 * MiB),
    "everything twice": ("-m dup -d dup", 300 * MiB),
    "mixed groups": ("-M", 150 * MiB),
    "xxhash": ("--csum xxhash", 300 * MiB),
    "sha256": ("--csum sha256", 300 * MiB),
    "blake2": ("--csum blake2", 300 * MiB),
    "nodes of 4 KiB": ("-n 4096", 300 * MiB),
    "nodes of 64 KiB": ("-n 65536", 300 * MiB),
    "an old format": ("-O ^no-holes,^skinny-metadata,^extref -R ^free-space-tree", 300 * MiB),
}


def make(path: Path, options: str, size: int) -> Path:
    run("mkfs.btrfs", "-q", "-f", *options.split(), blank(path, size))
    return path


@needs_root
@pytest.mark.parametrize("features", FEATURES)
async def test_a_copy_of_the_used_blocks_is_the_same_filesystem(features: str, tmp_path: Path) -> None:
    need("mkfs.btrfs", "btrfs")
    image = make(tmp_path / "image", *FEATURES[features])
    with mounted(image) as folder:
        fill(folder)
        run("btrfs", "subvolume", "snapshot", folder, folder / "then")
        (folder / "folder1" / "file8").write_bytes(b"changed")
    with mounted(image, "loop,ro") as before:
        wanted = hashes(before)
    used = await map_of(image)
    assert isinstance(used, UsedMap), used
    copy = copy_used(image, used)
    run("btrfs", "check", "--check-data-csum", copy)
    need("partclone.btrfs")
    node = {"-n 4096": 4096, "-n 65536": 65536, "-M": 4096}.get(FEATURES[features][0], 16384)
    assert used.units_used * used.unit // node == partclone_blocks("btrfs", image)
    image.unlink()  # the kernel takes two devices with one UUID for one
    with mounted(copy, "loop,ro") as after:
        assert hashes(after) == wanted


@needs_root
async def test_many_extents_make_a_deep_tree_and_are_mapped(tmp_path: Path) -> None:
    need("mkfs.btrfs", "btrfs")
    image = make(tmp_path / "image", "-n 4096", 300 * MiB)
    with mounted(image) as folder:
        for number in range(3000):
            (folder / f"{number}").write_bytes(bytes([number & 0xFF]) * 5000)
        run("sync", "-f", folder)
        for number in range(0, 3000, 2):
            (folder / f"{number}").unlink()
    used = await map_of(image)
    assert isinstance(used, UsedMap), used
    run("btrfs", "check", "--check-data-csum", copy_used(image, used))


async def test_the_map_of_100_gib_takes_less_than_a_second(tmp_path: Path) -> None:
    need("mkfs.btrfs")
    image = make(tmp_path / "image", "", 100 * GiB)
    begun = time.process_time()
    used = await map_of(image)
    assert time.process_time() - begun < 1
    assert isinstance(used, UsedMap)
    assert used.used_bytes < 30 * MiB


@needs_root
async def test_one_device_of_a_mirror_is_mapped(tmp_path: Path) -> None:
    need("mkfs.btrfs", "btrfs")
    one, two = blank(tmp_path / "one", 300 * MiB), blank(tmp_path / "two", 300 * MiB)
    run("mkfs.btrfs", "-q", "-f", "-m", "raid1", "-d", "raid1", one, two)
    for image in (one, two):
        used = await map_of(image)
        assert isinstance(used, UsedMap), used


async def test_stripes_over_devices_are_copied_whole(tmp_path: Path) -> None:
    need("mkfs.btrfs")
    one, two = blank(tmp_path / "one", 300 * MiB), blank(tmp_path / "two", 300 * MiB)
    run("mkfs.btrfs", "-q", "-f", "-m", "raid1", "-d", "raid0", one, two)
    refusal = await map_of(one)
    assert isinstance(refusal, Refusal)
    assert "striped" in refusal.reason


async def test_a_log_tree_is_copied_whole(tmp_path: Path) -> None:
    need("mkfs.btrfs")
    image = make(tmp_path / "image", "--csum sha256", 300 * MiB)
    with image.open("r+b") as file:
        file.seek(64 * KiB)
        block = bytearray(file.read(4096))
        struct.pack_into("<Q", block, 96, 30 * MiB)
        block[:32] = hashlib.sha256(block[32:]).digest()
        file.seek(64 * KiB)
        file.write(block)
    refusal = await map_of(image)
    assert isinstance(refusal, Refusal)
    assert "log" in refusal.reason


async def test_a_damaged_superblock_is_copied_whole(tmp_path: Path) -> None:
    need("mkfs.btrfs")
    image = make(tmp_path / "image", "", 300 * MiB)
    with image.open("r+b") as file:
        file.seek(64 * KiB + 200)
        file.write(b"\xff")
    refusal = await map_of(image)
    assert isinstance(refusal, Refusal)
    assert "checksum" in refusal.reason
